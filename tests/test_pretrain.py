"""Training from Python: the call that `train.py` makes, with the project's data and with data of one's own."""

import json
import re

import numpy as np
import pytest

import contrastive_jax as cj
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.pretrain import check_same_clusters, check_sample_counts, metadata_of
from contrastive_jax.runs import read_json_lines
from contrastive_jax.training.run import Run
from data import build
from data.clusters import write_clusters
from data.sources import Example, Text, stable_hash
from tests import runs, tiny


class Squares:
  """Two hundred grey squares that say how bright they are."""

  name = "squares"

  def __len__(self):
    return 200

  def __getitem__(self, index):
    return Example(np.full((20, 20, 3), index, np.uint8), self.text(index), index)

  def text(self, index):
    return Text((f"a square of brightness {index}",), stable_hash("squares", index))


class OwnData:
  """The project's pipeline over a source that no config can name."""

  def __getattr__(self, name):
    return getattr(build, name)

  def open_sources(self, config, names):
    return {name: Squares() for name in names}

  def attribution(self, names):
    return ""


@pytest.fixture(scope="module")
def config():
  made = tiny.get_config()
  made.total_steps, made.batch_size, made.checkpoint_every = 4, 16, 2
  made.schedule.warmup_steps = 1
  made.data.sources = dict.fromkeys(("squares", "fields", "tiles", "blanks"), 1.0)
  return made


@pytest.mark.slow
def test_mistakes_leave_no_lock_and_a_call_trains_and_another_goes_on_with_data_of_ones_own(config, tmp_path, capsys):
  wrong = config.copy_and_resolve_references()
  wrong.optimizer.learning_rate = -1.0
  with pytest.raises(UserError, match=r"optimizer\.learning_rate=-1\.0"):
    cj.train(wrong, tmp_path / "run", data=OwnData())
  with pytest.raises(UserError, match=r"data\.sources"):  # The project's data know no squares.
    cj.train(config, tmp_path / "run", data=build)
  outcome = cj.train(config, tmp_path / "run", data=OwnData())
  assert (outcome.step, outcome.exit_code, outcome.results) == (4, 0, ())
  said = capsys.readouterr()
  assert "16 x" not in said.err
  # Sources are told in one order, whatever the hashes of their names.
  drawn = [f"{name} 200 (0.08 epochs)" for name in ("blanks", "fields", "squares", "tiles")]
  assert f"on {' + '.join(drawn)}." in said.out
  longer = config.copy_and_resolve_references()
  longer.total_steps, longer.schedule.on_growth = 6, "stretch"
  assert cj.train(longer, str(tmp_path / "run"), data=OwnData()).step == 6
  rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  model = cj.load(tmp_path / "run")
  assert model.step == 6 and model.encode_text(["a square of brightness 3"]).shape == (1, 16)


def test_a_source_that_grew_or_shrank_has_no_rows_in_a_state_of_every_sample():
  started = {"samples": {"fields": 200, "squares": 200}}
  check_sample_counts({"squares": 200, "fields": 200}, started)
  check_sample_counts({"squares": 300, "tiles": 5}, {})  # A new run, or one that remembers no samples yet.
  for counts, named in (({"squares": 201, "fields": 200}, "squares"), ({"squares": 200, "fields": 1}, "fields")):
    with pytest.raises(UserError, match=f"the sources of the run cannot change: {named} differ; start a new run with"):
      check_sample_counts(counts, started)
  with pytest.raises(UserError, match="cannot change: tiles differ"):
    check_sample_counts({"squares": 200, "fields": 200, "tiles": 7}, started)


@pytest.mark.slow
def test_a_run_goes_on_with_the_clusters_that_it_drew_from_or_with_those_of_another_folder(config, tmp_path):
  tokenizer = tokenizers.train_bpe(["a square"], 300)

  def write(folder, shift):
    for name in config.data.sources:
      write_clusters(tmp_path / folder, name, (np.arange(200) + shift) // 50 % 4, np.zeros((4, 2)), 4, {})

  def go_on(clusters, metadata, step):
    """Returns what the checkpoints of a session that begins at a step hold."""
    given = config.copy_and_resolve_references()
    given.total_steps, given.data.clusters = 8, clusters and str(tmp_path / clusters)
    run = Run.from_config(given)
    changed = bool(metadata) and metadata["config"]["data"]["clusters"] != given.data.clusters
    segments = run.segments_after(metadata, step, data_changed=changed)
    sources = OwnData().open_sources(given, given.data.sources)
    digests = build.make_pipeline(run, segments, sources, tokenizer, (0, 1), start=step).cluster_digests
    check_same_clusters(digests, given.data.clusters, metadata)
    return json.loads(json.dumps(metadata_of(run, segments, (), tokenizer, {}, digests)))

  write("first", 0)
  began = go_on("first", {}, 0)
  write("first", 7)
  with pytest.raises(UserError, match=r"first has other clusters of blanks, fields, .* put these back, or write"):
    go_on("first", began, 2)
  write("first", 0)
  began = go_on("first", began, 2)
  write("second", 7)
  second = go_on("second", began, 4)
  write("first", 7)  # What became of the first ones does not matter any more.
  second = go_on("second", second, 5)
  without = go_on("", second, 6)
  done = [(segment["steps"], segment["clustered"]) for segment in without["segments"]]
  assert done == [(4, True), (2, True), (2, False)] and "clusters" not in without


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
  text = (runs.ROOT / "README.md").read_text(encoding="utf-8")
  (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "cj.train" in block]
  assert len(block.strip().splitlines()) <= 10
  small = {"from configs import emoji": "from tests import tiny as emoji", "= 300, 128": "= 6, 32"}
  for given, smaller in {**small, '"runs/mine"': repr(str(tmp_path / "run"))}.items():
    assert given in block
    block = block.replace(given, smaller)
  script = tmp_path / "mine.py"
  script.write_text(block)
  runs.run(str(script), PYTHONPATH=str(runs.ROOT))
  assert (tmp_path / "run" / "report.html").is_file()
