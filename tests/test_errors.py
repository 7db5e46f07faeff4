"""A user's mistake is one sentence and exit code 2, and nothing is written."""

import pytest

from tests import runs

pytestmark = pytest.mark.slow

MISTAKES = {
  "batch_size=-7 must be at least 1": ["--config.batch_size=-7"],
  "batch_size=33 does not divide over 8 devices": ["--config.batch_size=33"],
  "did you mean 'batch_size'": ["--config.batchsize=64"],
  "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 8 devices": ["--config.mesh.data=3"],
  "schedule.warmup_steps=99": ["--config.schedule.warmup_steps=99"],
  "did you mean 'softmax'": ["--config.loss=sofmax"],
  "did you mean 'adamw'": ["--config.optimizer.name=adam"],
  "did you mean 'emoji_openmoji'": ["--config.evals=emoji_openmojis"],
  "did you mean 'twemoji'": ["--config.data.sources={'twemojis': 1.0}"],
  "the TFDS set 'no_such_set' is not in": ["--config.data.sources={'tfds/no_such_set': 1.0}"],
  "matches no parameter": ["--config.frozen=visual/"],
  "init_from=nowhere": ["--config.init_from=nowhere"],
  "transformer.heads=5 must divide": ["--config.model.text.transformer.heads=5"],
  "no/such.json": ["--config.tokenizer.spec=file:no/such.json"],
  "loss_options.softmax.strategy='rings'": ["--config.loss_options.softmax.strategy=rings"],
  "loss_options.softmax.tile=0 must be at least 1": ["--config.loss_options.softmax.tile=0"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_one_sentence(sentence, tmp_path):
  workdir = tmp_path / "run"
  output = runs.train(workdir, *MISTAKES[sentence], devices=8, expected=2)
  assert sentence in output
  assert "Traceback" not in output and len(output.strip().splitlines()) == 1
  assert not list(tmp_path.rglob("*.json*"))


def test_a_workdir_of_another_config_is_left_alone(tmp_path):
  runs.train(tmp_path, "--config.total_steps=4", "--config.schedule.warmup_steps=1")
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  for change, named in {
    "--config.seed=1": "seed=0, not 1",
    "--config.optimizer.learning_rate=0.5": "optimizer.learning_rate=0.001, not 0.5",
    "--config.total_steps=3": "total_steps=3 is less than the 4",
  }.items():
    overrides = ["--config.total_steps=4", "--config.schedule.warmup_steps=1", change]
    output = runs.train(tmp_path, *overrides, expected=2)
    assert named in output and len(output.strip().splitlines()) == 1
  (tmp_path / "tokenizer" / "tokenizer.json").write_text((tmp_path / "config.json").read_text())
  runs.run("eval.py", f"--workdir={tmp_path}", expected=2)
  (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(before[tmp_path / "tokenizer" / "tokenizer.json"])
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    ([], "--workdir is missing"),
    (["--workdir=no/such/run"], "no/such/run"),
    (["--workdir=no/such/run", "--tasks=emoji_openmojo"], "did you mean 'emoji_openmoji'"),
  ],
)
def test_eval_says_what_is_missing(arguments, sentence):
  output = runs.run("eval.py", *arguments, expected=2)
  assert sentence in output and len(output.strip().splitlines()) == 1
