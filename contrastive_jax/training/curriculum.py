"""A run as a list of segments: which samples of which source any step draws, by arithmetic alone.

Slots number the pairs of a segment in order: slot `s` is row `s % batch_size` of the segment's step `s // batch_size`.
A segment hands its slots to its sources by a fixed periodic schedule, so the number of samples that a source gave
to the first `n` slots is a closed form, and a source's cursor at any step is the sum over the segments before it plus
that number. Nothing else needs to be stored to resume.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from contrastive_jax.errors import UserError, nearest

MODALITIES = ("image",)
# Weights whose exact period is longer are rounded to shares of this many slots.
LONGEST_PERIOD = 1 << 14


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of steps with one batch size and one mixture.

  Attributes:
    steps: number of steps.
    batch_size: pairs a step, over all hosts.
    sources: (name, weight) of each source; weights are relative.
    resolution: height and width of the images in pixels.
    modality: "image".

  Raises:
    UserError: if a field is impossible.
  """

  steps: int
  batch_size: int
  sources: tuple[tuple[str, int | float], ...]
  resolution: int
  modality: str = "image"

  def __post_init__(self):
    object.__setattr__(self, "sources", tuple((str(name), weight) for name, weight in self.sources))
    for field in ("steps", "batch_size", "resolution"):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"segment {field} is {value!r}, it must be a whole number of at least 1")
    if self.modality not in MODALITIES:
      raise UserError(
        f"segment modality is {self.modality!r}, known are {', '.join(MODALITIES)}{nearest(self.modality, MODALITIES)}"
      )
    if not self.sources:
      raise UserError("segment sources is empty, name at least one source and its weight")
    names = [name for name, _ in self.sources]
    if len(set(names)) < len(names):
      raise UserError(f"segment sources names a source twice: {', '.join(names)}")
    for name, weight in self.sources:
      if isinstance(weight, bool) or not isinstance(weight, int | float) or not (0 < weight < math.inf):
        raise UserError(f"the weight of source {name!r} is {weight!r}, it must be a positive number")

  @property
  def slots(self) -> int:
    """Pairs drawn by the whole segment."""
    return self.steps * self.batch_size

  def to_dict(self) -> dict[str, Any]:
    """Returns what JSON can hold and `from_dict` understands."""
    return dataclasses.asdict(self) | {"sources": [[name, weight] for name, weight in self.sources]}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Segment":
    """Returns the segment that `to_dict` described.

    Raises:
      UserError: if a field is unknown or missing.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
      if name not in known:
        raise UserError(f"segment has no field {name!r}{nearest(name, known)}")
    missing = [name for name in known if name not in fields and name != "modality"]
    if missing:
      raise UserError(f"segment lacks the field {missing[0]!r}")
    return cls(**{**fields, "sources": tuple((name, weight) for name, weight in fields["sources"])})


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
  drawn: dict[str, int] = {name: 0 for segment in segments[: index + 1] for name, _ in segment.sources}
  for segment in segments[:index]:
    for name, count in draws(segment, segment.slots).items():
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


def draws(segment: Segment, slots: int) -> dict[str, int]:
  """Samples that each source gives to the first `slots` slots: within one of its share, at every prefix."""
  schedule = _schedule(segment.sources)
  rounds, rest = divmod(slots, len(schedule.source))
  counts = rounds * schedule.counts + np.bincount(schedule.source[:rest], minlength=len(segment.sources))
  return {name: int(count) for (name, _), count in zip(segment.sources, counts, strict=True)}


def assign(segment: Segment, slots: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Says who fills each slot.

  Args:
    segment: the segment.
    slots: slot numbers within the segment.

  Returns:
    For each slot the source's position in `segment.sources`, and how many samples that source gave to earlier slots of
    the segment.
  """
  schedule = _schedule(segment.sources)
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
