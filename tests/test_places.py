"""Runs in odd places, twice at once, and killed: as a user does it."""

import io
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests import runs

pytestmark = pytest.mark.slow

SHORT = ("--config.total_steps=2", "--config.schedule.warmup_steps=1", "--config.checkpoint_every=2")
LONGER = ("--config.total_steps=3", *SHORT[1:])
NAME = "again[1] *?#%41 {x} ~ ünï, -- 'a' \"b\""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a run of odd name, compiled programs, texts, and a set of TFDS with dots in its name."""
  place = tmp_path_factory.mktemp("place")
  patch = pytest.MonkeyPatch()
  patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))
  patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  runs.train(place / NAME, *SHORT)
  (place / "texts.txt").write_text("a cat\na dog\n")
  prepare(place / "sets [1]")
  yield place
  patch.undo()


def prepare(data_dir: Path) -> None:
  """Writes the sets dotted/small:1.0.0 and dotted/big.v2:2.0.0: eight grey pictures with texts and labels."""

  class Dotted(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = (
      tfds.core.BuilderConfig(name="small", version=tfds.core.Version("1.0.0")),
      tfds.core.BuilderConfig(name="big.v2", version=tfds.core.Version("2.0.0")),
    )
    code_path = None

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(9, 9, 3)),
        "caption": tfds.features.Text(),
        "title": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["dark", "light"]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
      for k in range(8):
        picture = io.BytesIO()
        Image.new("RGB", (9, 9), (30 * k,) * 3).save(picture, "PNG")
        yield (
          k,
          {"image": io.BytesIO(picture.getvalue()), "caption": f"number {k}", "title": f"title {k}", "label": k // 4},
        )

  for config in Dotted.BUILDER_CONFIGS:
    builder = Dotted(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare()


def test_a_run_in_an_oddly_named_place_resumes_scores_and_embeds(place):
  workdir = place / NAME
  said = runs.train(f"file://{workdir.as_posix().replace('%', '%25')}", *LONGER, "--config.data.workers=1")
  assert "from step 2" in said
  output = place / os.fsdecode(b"caf\xe9 [1]") / "texts.parquet"
  texts = place / "link to texts"
  texts.symlink_to("texts.txt")
  said += runs.run("embed.py", f"--workdir={workdir}/../{NAME}/", f"--texts={texts}", f"--output={output}")
  assert output.exists()
  # Nothing that the libraries below say to those who program with them.
  assert not re.search(r"Warning|^[WE]\d{4} |deprecated", said, flags=re.MULTILINE), said


def test_sets_with_dots_in_their_names_are_trained_on_and_scored(place, tmp_path):
  data = f"--config.data.data_dir={place / 'sets [1]'}"
  sources = "{'big': {'name': 'tfds/dotted/big.v2@train[:75%]'}, 'small': {'name': 'tfds/dotted/small:1.0.0'}}"
  evals = ("tfds/dotted/big.v2@test:caption_key=title", "tfds/dotted/small:1.0.0@" + "+".join(["test"] * 60))
  small = ("--config.batch_size=4", "--config.model.text.vocab_size=300", f"--config.final_evals={evals}")
  runs.train(tmp_path, *SHORT, data, f"--config.data.sources={sources}", *small)
  results = [json.loads(path.read_text()) for path in (tmp_path / "eval").glob("*.json")]
  assert sorted(result["dataset"] for result in results) == sorted(evals)
  said = runs.train(tmp_path, *SHORT, data, "--config.data.sources={'tfds/dotted/big.v2': 1.0}", expected=2)
  assert "holds a dot" in said and '{"name": "tfds/dotted/big.v2"' in said


def test_the_second_run_at_once_is_refused_and_the_workers_of_a_killed_run_end(place):
  workdir = place / "killed"
  # Of a start that made no checkpoint nothing is kept: its tokenizer, of whatever data, is made anew.
  stored = workdir / "tokenizer" / "tokenizer.json"
  stored.parent.mkdir(parents=True)
  stored.write_text("{}")
  long = ("--config.total_steps=100000", "--config.data.workers=2", "--config.checkpoint_every=100000")
  first = runs.start("train.py", runs.TINY, f"--workdir={workdir}", *long)
  try:
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text(), first)
    assert stored.read_text() != "{}"
    output = runs.train(workdir, *long, expected=2)
    assert f"in use by process {first.pid} " in output and len(output.strip().splitlines()) == 1
    workers = descendants(first.pid)
    assert len(workers) >= 2
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  deadline = time.monotonic() + 10
  while any(is_alive(worker) for worker in workers):
    assert time.monotonic() < deadline, "workers outlive their run"
    time.sleep(0.2)


def test_weights_that_are_gone_do_not_stop_a_run_that_has_checkpoints(place, tmp_path):
  start = f"--config.init_from={place / NAME}"
  runs.train(tmp_path / "b", *SHORT, start)
  os.rename(place / NAME, place / "gone")
  try:
    assert "from step 2" in runs.train(tmp_path / "b", *LONGER, start)
    assert "is not a run directory" in runs.train(tmp_path / "c", *SHORT, start, expected=2)
  finally:
    os.rename(place / "gone", place / NAME)


def wait_for(condition, process) -> None:
  """Waits until a condition holds, as long as the process lives."""
  deadline = time.monotonic() + 400
  while not condition():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.2)


def descendants(pid: int) -> list[int]:
  """Processes below one, by their numbers."""
  children = Path(f"/proc/{pid}/task").glob("*/children")
  below = [int(child) for file in children for child in file.read_text().split()]
  return [*below, *(deeper for child in below for deeper in descendants(child))]


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that nobody has waited for does not."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False
