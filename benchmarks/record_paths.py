"""Every path that reads records, given one file, and what it takes in memory."""

import contextlib
import ctypes
import dataclasses
import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill
from benchmarks.fuzz_records import Letters, small_model
from contrastive_jax.bad_records import BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import unreadable
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.video import open_clip
from contrastive_jax.schedule.segments import Clips, Segment
from data import embedding_files
from data.augment import PRESETS
from data.extras import ExtrasOptions, TeacherView
from data.pipeline import Pipeline
from data.sources import Example, Text


@dataclasses.dataclass(frozen=True)
class _One:
  """A source, and an evaluation set, of one file."""

  path: Path
  moving: bool
  name: str = "one"

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: int, /) -> Example:
    image = open_clip(self.path.read_bytes()) if self.moving else decode(self.path.read_bytes(), background=None)
    return Example(image, self.text(index), index)

  def text(self, index: int) -> Text:
    return Text(("a picture",), 1)


def _train(path: Path, moving: bool, resolution: Resolution, augment: str = "none", teacher: bool = False) -> None:
  """Reads one batch of one pair as training reads it."""
  clips = Clips((("one", 1),), 1.0, resolution, 8) if moving else None
  segment = Segment(1, 1, (("one", 1),), resolution, clips=clips, taught=teacher)
  extras = ExtrasOptions(teacher=TeacherView(336, 14) if teacher else None)
  options = {"text_length": 8, "patch_size": 14, "tubelet": 2, "seed": 0, "augment": PRESETS[augment], "extras": extras}
  # Not by `batch`, which looks for a substitute of a bad record; this one has none.
  Pipeline((segment,), {"one": _One(path, moving)}, Letters(), **options).batch(0)


def _evaluate(path: Path, moving: bool) -> None:
  images = [open_clip(path.read_bytes()) if moving else path.read_bytes()]
  ledger = BadRecords()
  unreadable.embedded(small_model().encode_image, images, "one", ledger)
  if ledger.count:
    raise DecodeError("it was left out")


def _embed(path: Path, moving: bool) -> None:
  output = path.with_suffix(".npy")
  embedding_files.write(output, small_model(), ["one"], [path])


def _distill(path: Path, moving: bool) -> None:
  for ids, _ in distill.embedded(small_model(), "one", _One(path, moving)):
    if not len(ids):
      raise DecodeError("it was left out")


_NATIVE = Resolution("native", min_tokens=576, max_tokens=5832)
PATHS: dict[str, Callable[[Path, bool], Any]] = {
  "decode": lambda path, moving: _One(path, moving)[0],
  "resize": lambda path, moving: _train(path, moving, Resolution.fixed(224)),
  "crop": lambda path, moving: _train(path, moving, Resolution.fixed(224), "photographs"),
  "native": lambda path, moving: _train(path, moving, _NATIVE),
  "teacher": lambda path, moving: _train(path, moving, Resolution.fixed(224), "photographs", teacher=True),
  "evaluation": _evaluate,
  "embed": _embed,
  "distill": _distill,
}


def report(ways: list[str], small: Path, large: Path, moving: bool, answer: Any) -> None:
  """Sends (megabytes above what there was before, why it was refused) for each path; runs in a process of its own."""
  warnings.simplefilter("ignore")
  for way in ways:
    with contextlib.suppress(DecodeError, UserError):  # Of a kind that is refused in every size.
      PATHS[way](small, moving)
  found = []
  for way in ways:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What is free is not to be taken for what a record can do without.
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
    refused = ""
    try:
      PATHS[way](large, moving)
    except (DecodeError, UserError) as error:
      refused = str(error)
    found.append((_status("VmHWM") - before, refused))
  answer.send(found)


def _status(field: str) -> float:
  """Megabytes of this process."""
  found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
  assert found, f"/proc/self/status has no {field}"
  return int(found[1]) / 1e3
