"""A run as a list of segments: which samples of which source any step draws, by arithmetic alone.

A segment's steps take turns between images and clips; slots number the pairs of one modality in order: slot `s` is row
`s % batch_size` of the segment's `s // batch_size`-th step of that modality. A segment hands its slots to its sources
by a fixed periodic schedule, so the number of samples that a source gave to the first `n` slots is a closed form, and
a source's cursor at any step is the sum over the segments before it plus that number. Nothing else needs to be stored
to resume.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.preprocess.resolution import Resolution

MODALITIES = ("image", "clip")
FRAME_RULES = ("uniform", "random", "fps")
# Weights whose exact period is longer are rounded to shares of this many slots.
LONGEST_PERIOD = 1 << 14
# Shares of clips are rounded to turns out of at most this many steps.
LONGEST_ROUND = 100

Sources = tuple[tuple[str, int | float], ...]


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows that the images, clips or captions of one pack share.

  Attributes:
    count: of rows.
    length: of a row in tokens.
  """

  count: int
  length: int

  def __post_init__(self):
    if self.count < 1 or self.length < 1:
      raise UserError(f"the rows of a pack are {self.count} of {self.length} tokens, both must be at least 1")


@dataclasses.dataclass(frozen=True)
class Clips:
  """The steps of a segment that show clips, and how.

  Attributes:
    sources: (name, weight) of each source of clips.
    share: of the segment's steps, above 0 and at most 1.
    resolution: of the frames; `max_tokens` bounds the whole clip.
    frames: of a clip, a multiple of `vision.tubelet`.
    rule: how frames are chosen: "uniform", "random" or "fps", see `preprocess.video.choose_frames`.
    rate: frames a second, for "fps".
    rows: of a pack; None gives each clip a row of its own.
    seed: of the order of turns.
  """

  sources: Sources
  share: float
  resolution: Resolution
  frames: int
  rule: str = "random"
  rate: float = 0.0
  rows: Rows | None = None
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, "sources", _checked_sources(self.sources))
    require_known("frame_rule", self.rule, FRAME_RULES)
    if not 0 < self.share <= 1:
      raise UserError(f"video_share={self.share} must be above 0 and at most 1")
    if self.frames < 1:
      raise UserError(f"frames={self.frames} must be at least 1")
    if self.rule == "fps" and not self.rate > 0:
      raise UserError(f"frame_rate={self.rate} must be above 0 with frame_rule='fps'")

  @property
  def turns(self) -> Fraction:
    """The share as clip steps out of a round of steps."""
    return max(Fraction(str(self.share)).limit_denominator(LONGEST_ROUND), Fraction(1, LONGEST_ROUND))


@dataclasses.dataclass(frozen=True)
class Feed:
  """What the batches of one modality of a segment hold; see `Segment` and `Clips`."""

  sources: Sources
  resolution: Resolution
  rows: Rows | None
  frames: int = 1
  rule: str = "uniform"
  rate: float = 0.0

  def times(self, tubelet: int) -> int:
    """Patches along time: 1 of an image, tubelets of a clip."""
    return 1 if self.frames == 1 else self.frames // tubelet

  def row_lengths(self, patch_size: int, tubelet: int) -> tuple[int, ...]:
    """Tokens of the rows that are not packed: one length, or those that NaFlex draws from."""
    if self.resolution.mode == "naflex":
      return self.resolution.lengths
    if self.resolution.mode == "native":
      return (self.resolution.max_tokens,)
    return (self.times(tubelet) * (self.resolution.size // patch_size) ** 2,)


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of steps with one batch size and one mixture: a stage of the curriculum, or what is left of one.

  Attributes:
    steps: number of steps.
    batch_size: pairs a step, over all hosts.
    sources: (name, weight) of each source of images; weights are relative.
    resolution: of the images; a number of pixels means squares.
    name: of the stage.
    rows: of a pack of images; None gives each image a row of its own.
    pack_pairs: pairs of a pack: those that share rows. 0 packs nothing.
    text_rows: of a pack of captions; None gives each caption a row of its own.
    clips: what some of the steps show instead of images; None for images only.
    taught: whether a frozen teacher sees the pairs too.

  Raises:
    UserError: if a field is impossible.
  """

  steps: int
  batch_size: int
  sources: Sources
  resolution: Resolution | int
  name: str = ""
  rows: Rows | None = None
  pack_pairs: int = 0
  text_rows: Rows | None = None
  clips: Clips | None = None
  taught: bool = False

  def __post_init__(self):
    if isinstance(self.resolution, int):
      object.__setattr__(self, "resolution", Resolution.fixed(self.resolution))
    object.__setattr__(self, "sources", _checked_sources(self.sources))
    for field in ("steps", "batch_size"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"segment {field} is {value!r}, it must be a whole number of at least 1")
    packs = [rows for rows in (self.rows, self.text_rows, self.clips and self.clips.rows) if rows]
    if packs and self.pack_pairs < 1:
      raise UserError(
        f"data.pack_pairs={self.pack_pairs} must be at least 1 where images, clips or captions are packed"
      )
    if self.pack_pairs and self.batch_size % self.pack_pairs:
      stage = f" of stage '{self.name}'" if self.name else ""
      raise UserError(
        f"batch_size={self.batch_size}{stage} is not a multiple of data.pack_pairs={self.pack_pairs}: change either"
      )

  @property
  def slots(self) -> int:
    """Pairs drawn by the whole segment."""
    return self.steps * self.batch_size

  def turn(self, offset: int) -> tuple[str, int]:
    """The modality of one of the segment's steps, and how many of its earlier steps had the same."""
    if self.clips is None:
      return "image", offset
    number, place = divmod(offset, self.clips.turns.denominator)
    shows_clips = _round(self.clips.seed, number, self.clips.turns)
    modality = "clip" if shows_clips[place] else "image"
    return modality, self.steps_of(modality, offset)

  def steps_of(self, modality: str, steps: int) -> int:
    """How many of the first `steps` steps are of a modality."""
    if self.clips is None:
      return steps if modality == "image" else 0
    turns = self.clips.turns
    rounds, rest = divmod(steps, turns.denominator)
    clips = rounds * turns.numerator + int(_round(self.clips.seed, rounds, turns)[:rest].sum())
    return clips if modality == "clip" else steps - clips

  def feed(self, modality: str) -> Feed:
    """What the batches of a modality hold."""
    if modality == "image":
      return Feed(self.sources, self.resolution, self.rows)
    clips = self.clips
    return Feed(clips.sources, clips.resolution, clips.rows, clips.frames, clips.rule, clips.rate)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Those that the segment's steps have."""
    return tuple(m for m in MODALITIES if self.steps_of(m, self.steps))

  def all_sources(self) -> tuple[str, ...]:
    """Names of the sources of all modalities, once each."""
    return tuple(dict.fromkeys(name for m in self.modalities for name, _ in self.feed(m).sources))

  def to_dict(self) -> dict[str, Any]:
    """Returns what JSON can hold and `from_dict` understands."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Segment":
    """Returns the segment that `to_dict` described, perhaps through JSON, perhaps before there were stages.

    Raises:
      UserError: if a field is unknown or missing.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    fields = {name: value for name, value in fields.items() if name != "modality"}
    for name in fields:
      if name not in known:
        raise UserError(f"segment has no field {name!r}{nearest(name, known)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]
    if missing:
      raise UserError(f"segment lacks the field {missing[0]!r}")
    return cls(**_parsed(fields))


def _parsed(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The nested parts of a segment or its clips, from dictionaries."""
  readers = {
    "resolution": Resolution.from_dict,
    "rows": lambda rows: Rows(**rows),
    "text_rows": lambda rows: Rows(**rows),
    "clips": lambda clips: Clips(**_parsed(clips)),
  }
  parsed = {name: readers[name](v) if isinstance(v, Mapping) else v for name, v in fields.items()}
  return {**parsed, "sources": tuple((name, weight) for name, weight in fields["sources"])}


def _checked_sources(sources: Sequence[Sequence[Any]]) -> Sources:
  checked = tuple((str(name), weight) for name, weight in sources)
  if not checked:
    raise UserError("segment sources is empty, name at least one source and its weight")
  names = [name for name, _ in checked]
  if len(set(names)) < len(names):
    raise UserError(f"segment sources names a source twice: {', '.join(names)}")
  for name, weight in checked:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (0 < weight < math.inf):
      raise UserError(f"the weight of source {name!r} is {weight!r}, it must be a positive number")
  return checked


@functools.lru_cache(maxsize=1024)
def _round(seed: int, number: int, turns: Fraction) -> np.ndarray:
  """Which steps of a round of turns show clips: the same number in every round, in an order of its own."""
  order = np.argsort(np.random.Generator(np.random.Philox(key=[seed, number])).random(turns.denominator))
  return order < turns.numerator


def total_steps(segments: Sequence[Segment]) -> int:
  """Number of steps of the whole run."""
  return sum(segment.steps for segment in segments)


def segment_at(segments: Sequence[Segment], step: int) -> tuple[int, int]:
  """Finds the segment of a step.

  Args:
    segments: the run.
    step: 0 is the first step of the run.

  Returns:
    The segment's index, and the number of the segment's own steps before `step`.

  Raises:
    IndexError: if the run has no such step.
  """
  before = 0
  for index, segment in enumerate(segments):
    if before <= step < before + segment.steps:
      return index, step - before
    before += segment.steps
  raise IndexError(f"step {step} is outside of a run of {before} steps")


def cursors(segments: Sequence[Segment], index: int) -> dict[str, int]:
  """Samples that each source has given before segment `index` begins; a source met there for the first time is at 0."""
  drawn: dict[str, int] = {name: 0 for segment in segments[: index + 1] for name in segment.all_sources()}
  for segment in segments[:index]:
    for modality in segment.modalities:
      slots = segment.steps_of(modality, segment.steps) * segment.batch_size
      for name, count in draws(segment.feed(modality).sources, slots).items():
        drawn[name] += count
  return drawn


def slots_before(segments: Sequence[Segment], index: int) -> int:
  """Pairs drawn by the whole run before segment `index` begins."""
  return sum(segment.slots for segment in segments[:index])


def truncate(segments: Sequence[Segment], step: int) -> tuple[Segment, ...]:
  """The segments that make up the first `step` steps: what a run has done, before other segments are appended."""
  kept: list[Segment] = []
  for segment in segments:
    steps = min(segment.steps, step - total_steps(kept))
    if steps > 0:
      kept.append(dataclasses.replace(segment, steps=steps))
  return tuple(kept)


def ahead(segments: Sequence[Segment], step: int) -> tuple[Segment, ...]:
  """What is left of a run after its first `step` steps."""
  left: list[Segment] = []
  begins = 0
  for segment in segments:
    steps = segment.steps - max(0, step - begins)
    begins += segment.steps
    if steps > 0:
      left.append(dataclasses.replace(segment, steps=steps))
  return tuple(left)


def resume(
  done: Sequence[Segment], planned: Sequence[Segment], step: int, *, changed: bool = False
) -> tuple[Segment, ...]:
  """The segments of a run that goes on at `step`.

  Args:
    done: of the checkpoint, those that were still to come included; empty for a new run.
    planned: what the config says now.
    step: of the checkpoint.
    changed: whether the data changed in a way that segments do not tell.

  Returns:
    `done` where the plan for the rest is the same, with its last segment as long as the plan says; else what was done,
    and then the rest of the plan as further segments.
  """
  if not done:
    return tuple(planned)
  longer = dataclasses.replace(done[-1], steps=max(1, total_steps(planned) - total_steps(done[:-1])))
  extended = (*done[:-1], longer)
  if not changed and ahead(extended, step) == ahead(planned, step):
    return extended
  return (*truncate(done, step), *ahead(planned, step))


def draws(sources: Sources, slots: int) -> dict[str, int]:
  """Samples that each source gives to the first `slots` slots: within one of its share, at every prefix."""
  schedule = _schedule(sources)
  rounds, rest = divmod(slots, len(schedule.source))
  counts = rounds * schedule.counts + np.bincount(schedule.source[:rest], minlength=len(sources))
  return {name: int(count) for (name, _), count in zip(sources, counts, strict=True)}


def assign(sources: Sources, slots: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Says who fills each slot.

  Args:
    sources: of the slots' modality.
    slots: slot numbers within the segment and modality.

  Returns:
    For each slot the source's position in `sources`, and how many samples that source gave to earlier slots of the
    segment.
  """
  schedule = _schedule(sources)
  rounds, rest = np.divmod(slots, len(schedule.source))
  source = schedule.source[rest]
  return source, rounds * schedule.counts[source] + schedule.rank[rest]


@dataclasses.dataclass(frozen=True)
class _Schedule:
  """One period of a mixture: each slot's source, its rank among that source's slots, and the slots of each source."""

  source: np.ndarray
  rank: np.ndarray
  counts: np.ndarray


@functools.lru_cache(maxsize=256)
def _schedule(sources: tuple[tuple[str, int | float], ...]) -> _Schedule:
  """Interleaves the sources so that every prefix holds each within one sample of its share.

  The rule is Tijdeman's (The chairman assignment problem, 1980): among the sources whose next slot is due, take the one
  whose deadline is nearest. In units of 1 / (period * (2k - 2)), so that all comparisons are exact.
  """
  counts = _whole_shares([weight for _, weight in sources])
  period, k = sum(counts), len(counts)
  source = np.zeros(period, np.int64)
  if k > 1:
    given = [0] * k
    for slot in range(period):
      # Lag of a source: what its share of the slots up to this one exceeds what it got.
      lag = [count * (slot + 1) - period * got for count, got in zip(counts, given, strict=True)]
      due = [j for j in range(k) if lag[j] * (2 * k - 2) >= period]
      chosen = min(due, key=lambda j: (Fraction((2 * k - 3) * period - (2 * k - 2) * lag[j], counts[j]), j))
      source[slot] = chosen
      given[chosen] += 1
  rank = np.zeros(period, np.int64)
  for j in range(k):
    mine = source == j
    rank[mine] = np.arange(np.count_nonzero(mine))
  return _Schedule(source, rank, np.asarray(counts, np.int64))


def _whole_shares(weights: Sequence[int | float]) -> list[int]:
  """Whole numbers proportional to the weights as written in decimal; rounded only when their sum would be too long."""
  exact = [Fraction(str(weight)) for weight in weights]
  scaled = [weight * math.lcm(*(w.denominator for w in exact)) for weight in exact]
  shares = [int(weight) // math.gcd(*map(int, scaled)) for weight in scaled]
  if sum(shares) <= LONGEST_PERIOD:
    return shares
  total = sum(exact)
  return [max(1, round(weight / total * LONGEST_PERIOD)) for weight in exact]
