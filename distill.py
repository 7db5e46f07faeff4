"""Embeds the images of a run's sources with a frozen teacher, once, for `distillation.targets`.

python distill.py --teacher=runs/emoji --config=configs/univitar_emoji.py --output=runs/targets

An interrupted command resumes with the source at which it stopped. It runs in one process, on all its devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from contrastive_jax import cli, paths, progress
from contrastive_jax.bad_records import FILE, BadRecord, BadRecords, retried
from contrastive_jax.errors import UserError
from contrastive_jax.inference import Model
from contrastive_jax.loading import load
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import undo_premultiply
from contrastive_jax.run_lock import RunLock
from contrastive_jax.schedule.stages import segments_of, stages_of
from contrastive_jax.training import targets
from contrastive_jax.training.config import check_names_and_numbers
from data import build
from data.sources import Source
from data.substitution import shard_of

CONFIG = cli.define_config("The config of the student; the sources of its stages that distil are embedded.")
TEACHER = flags.DEFINE_string("teacher", None, "A run, or weights imported by convert.py.")
STEP = flags.DEFINE_integer("step", None, "Step of the teacher's checkpoint; the newest if not given.", lower_bound=0)
OUTPUT = flags.DEFINE_string(
  "output", None, "The folder to write; sources that it already holds from the same teacher are kept."
)
DTYPE = flags.DEFINE_enum("dtype", "float16", ("float16", "float32"), "The type of the embeddings on disk.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Number of images embedded at once.", lower_bound=1)

# Batches between two updates of the progress bar and two writes.
CHUNK = 8


class Pictures(Sequence):
  """Consecutive samples of a source, un-augmented, and their ids once they have been read."""

  def __init__(self, source: Source, start: int, stop: int, bad_records: BadRecords | None = None):
    self._source, self._start, self._bad_records = source, start, bad_records or BadRecords()
    self.ids = np.full(stop - start, -1, np.int64)

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index: int) -> object:
    at = self._start + index
    try:
      example = retried(lambda: self._source[at])
    except DecodeError as error:
      # It keeps the id of no sample, and what is made of this picture is dropped.
      split, shard = getattr(self._source, "split", ""), shard_of(self._source, at)
      record = BadRecord(self._source.name, at, str(error), split=split, shard=shard, use="distillation")
      self._bad_records.add(record)
      return np.zeros((1, 1, 3), np.uint8)
    self.ids[index] = example.id
    transparent = isinstance(example.image, np.ndarray) and example.image.shape[2:] == (4,)
    return undo_premultiply(example.image) if transparent else example.image


def main() -> None:
  config = cli.config_value(CONFIG)
  for flag, example in ((TEACHER, "runs/teacher"), (OUTPUT, "runs/targets")):
    if not flag.value:
      raise UserError(f"--{flag.name} is missing: name a folder such as --{flag.name}={example}")
  check_names_and_numbers(config)
  teacher = paths.run_to_read("--teacher", TEACHER.value)
  output = paths.folder_to_write("--output", OUTPUT.value)
  sources = build.open_sources(config, taught_sources(config))
  model = load(teacher, STEP.value, batch_size=BATCH_SIZE.value)
  with RunLock(output) as lock:
    write(output, model, sources, BadRecords(output / FILE, limit=config.data.max_bad_share), lock)


def write(output: Path, model: Model, sources: Mapping[str, Source], bad_records: BadRecords, lock: RunLock) -> None:
  """Embeds the sources that are not there yet."""
  lock.confirm(here=True)
  targets.describe(output, {"teacher": TEACHER.value, "step": model.step, "dim": model.config.embed_dim})
  for name, source in sources.items():
    if targets.has_source(output, name):
      print(f"{name}: already there")
      continue
    chunks = confirmed(embedded(model, name, source, bad_records), lock)
    written = targets.write_source(output, name, chunks, DTYPE.value)
    unread = len(source) - written
    print(f"{name}: {written:,} samples" + (f", {unread:,} could not be read or repeat another's id" if unread else ""))


def taught_sources(config: ConfigDict) -> list[str]:
  """The sources of the stages that distil."""
  stages = zip(stages_of(config), segments_of(config), strict=True)
  names = [name for stage, segment in stages if max(stage.distillation) > 0 for name in segment.all_sources()]
  if not names:
    raise UserError("every stage of the curriculum has distillation=(0, 0): none asks for targets")
  return list(dict.fromkeys(names))


def confirmed(
  chunks: Iterator[tuple[np.ndarray, np.ndarray]], lock: RunLock
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the chunks while the folder that they go to is this process's; see `RunLock.confirm`."""
  for chunk in chunks:
    lock.confirm(here=True)
    yield chunk
  lock.confirm(here=True)  # What has been written is put in order next.


def embedded(
  model: Model, name: str, source: Source, bad_records: BadRecords | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Ids and embeddings of the samples that can be read, a chunk at a time."""
  ledger, size = bad_records or BadRecords(), CHUNK * model.batch_size
  chunks = (np.arange(start, min(start + size, len(source))) for start in range(0, len(source), size))
  for rows in progress.shown(chunks, len(source), "images", name):
    pictures = Pictures(source, int(rows[0]), int(rows[-1]) + 1, ledger)
    images = model.encode_image(pictures)
    readable = pictures.ids >= 0
    ledger.read(len(pictures))
    ledger.check()
    yield pictures.ids[readable], images[readable]


if __name__ == "__main__":
  cli.run(main)
