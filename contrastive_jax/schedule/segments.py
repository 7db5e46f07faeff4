"""Segments of a run, and the arithmetic that says which samples of each source any step draws.

A *segment* is the one internal word for a stretch of steps that a run has done or will do: a stage of the config, or
what a resumed run kept of one. In each step a segment shows one modality, images or clips. The pairs of a modality are
numbered in order, and `interleaving` says which source gives each of them; a source's cursor at a step is the sum of
what it gave in the segments before and of what it gave in this one.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.preprocess.dropping import kept_count
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.interleaving import Sources, draws

MODALITIES = ("image", "clip")
FRAME_RULES = ("uniform", "random", "fps")
# Shares of clips are rounded to whole steps of a round of at most this many.
LONGEST_ROUND = 100


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows that the images, clips or captions of one pack share.

  Attributes:
    count: number of rows.
    length: length of a row in tokens.
  """

  count: int
  length: int

  def __post_init__(self):
    if self.count < 1 or self.length < 1:
      raise UserError(f"the rows of a pack are {self.count} of {self.length} tokens, both must be at least 1")


@dataclasses.dataclass(frozen=True)
class Clips:
  """The steps of a segment that show clips.

  Attributes:
    sources: (name, weight) of each source of clips.
    share: share of the segment's steps that show clips, above 0 and at most 1.
    resolution: the resolution of the frames; `max_tokens` bounds the whole clip.
    frames: number of frames of a clip, a multiple of `image.tubelet`.
    rule: the rule by which `preprocess.video.choose_frames` chooses frames: "uniform", "random" or "fps".
    rate: number of frames a second, for "fps".
    rows: the rows of a pack; None gives each clip a row of its own.
    seed: seed of the order in which steps show images and clips.
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
  def share_of_round(self) -> Fraction:
    """The share, as a number of clip steps and a number of steps of a round."""
    return max(Fraction(str(self.share)).limit_denominator(LONGEST_ROUND), Fraction(1, LONGEST_ROUND))


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of the image tower in the steps of one modality; `Segment` and `Clips` explain the fields."""

  sources: Sources
  resolution: Resolution
  rows: Rows | None
  frames: int = 1
  rule: str = "uniform"
  rate: float = 0.0
  drop_patches: float = 0.0

  def kept(self, patches: int) -> int:
    """Returns how many of an image's or a clip's patches are not dropped."""
    return kept_count(patches, self.drop_patches)

  def times(self, tubelet: int) -> int:
    """Returns the number of patches along time: 1 for an image, the tubelets of a clip."""
    return 1 if self.frames == 1 else self.frames // tubelet

  def row_lengths(self, patch_size: int, tubelet: int) -> tuple[int, ...]:
    """Returns the lengths of rows that are not packed: a single one, or those that NaFlex draws from.

    They are those of whole images, from which `kept` says what is left when patches are dropped.
    """
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
    batch_size: number of pairs of a step, over all hosts.
    sources: (name, weight) of each source of images; weights are relative.
    resolution: the resolution of the images; a number of pixels means squares.
    name: name of the stage.
    rows: the rows of a pack of images; None gives each image a row of its own.
    pack_pairs: number of pairs of a pack, which share rows; 0 packs nothing.
    text_rows: the rows of a pack of captions; None gives each caption a row of its own.
    clips: the steps that show clips instead of images; None for images only.
    taught: whether a frozen teacher sees the pairs too.
    captions_per_image: number of consecutive pairs that show one image, or clip, with captions of its own each.
    clustered: whether all pairs of a step are of one source, and of one of its clusters.
    drop_patches: share of the patches of each image, or clip, that are dropped at random, below 1.
    text_length: number of tokens that captions are cut to; 0 is all that the text tower reads.

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
  captions_per_image: int = 1
  clustered: bool = False
  drop_patches: float = 0.0
  text_length: int = 0

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
    if not 0 <= self.drop_patches < 1:
      raise UserError(f"drop_patches={self.drop_patches} must be at least 0 and below 1")
    if self.batch_size % self.captions_per_image:
      raise UserError(
        f"batch_size={self.batch_size} is not a multiple of data.captions_per_image={self.captions_per_image}: change"
        " either"
      )

  def caption_length(self, longest: int) -> int:
    """Returns the number of tokens of a caption, of the `longest` that the text tower reads."""
    return self.text_length or longest

  @property
  def images(self) -> int:
    """The number of images, or clips, that are drawn for a step."""
    return self.batch_size // self.captions_per_image

  @property
  def pairs(self) -> int:
    """The number of pairs in all of the segment's steps."""
    return self.steps * self.batch_size

  def modality_at(self, offset: int) -> tuple[str, int]:
    """Returns the modality of one of the segment's steps, and how many of its earlier steps had the same."""
    if self.clips is None:
      return "image", offset
    number, place = divmod(offset, self.clips.share_of_round.denominator)
    shows_clips = _round(self.clips.seed, number, self.clips.share_of_round)
    modality = "clip" if shows_clips[place] else "image"
    return modality, self.steps_of(modality, offset)

  def steps_of(self, modality: str, steps: int) -> int:
    """Counts how many of the first `steps` steps are of a modality."""
    if self.clips is None:
      return steps if modality == "image" else 0
    share = self.clips.share_of_round
    rounds, rest = divmod(steps, share.denominator)
    clips = rounds * share.numerator + int(_round(self.clips.seed, rounds, share)[:rest].sum())
    return clips if modality == "clip" else steps - clips

  def draws(self, modality: str, steps: int) -> dict[str, int]:
    """Counts the samples that each source gives in the first `steps` steps of a modality."""
    sources = self.inputs(modality).sources
    if not self.clustered:
      return draws(sources, steps * self.images)
    return {name: count * self.images for name, count in draws(sources, steps).items()}

  def inputs(self, modality: str) -> Inputs:
    """Returns the inputs of the image tower in the steps of a modality."""
    if modality == "image":
      return Inputs(self.sources, self.resolution, self.rows, drop_patches=self.drop_patches)
    clips = self.clips
    how = clips.resolution, clips.rows, clips.frames, clips.rule, clips.rate
    return Inputs(clips.sources, *how, self.drop_patches)

  @property
  def modalities(self) -> tuple[str, ...]:
    """The modalities that the segment's steps have."""
    return tuple(m for m in MODALITIES if self.steps_of(m, self.steps))

  def all_sources(self) -> tuple[str, ...]:
    """Returns the names of the sources of all modalities, each once."""
    return tuple(dict.fromkeys(name for m in self.modalities for name, _ in self.inputs(m).sources))

  def check_patches(self, patch_size: int) -> None:
    """Raises a `UserError` where images or clips are squares smaller than one patch.

    Args:
      patch_size: side of a patch in pixels.
    """
    for modality in self.modalities:
      resolution = self.inputs(modality).resolution
      if resolution.mode == "fixed" and resolution.size < patch_size:
        stage = f" of stage '{self.name}'" if self.name else ""
        raise UserError(
          f"size={resolution.size}{stage} is less than model.image.patch_size={patch_size}: use at least that"
        )

  def to_dict(self) -> dict[str, Any]:
    """Describes the segment in a dictionary that JSON can hold and `from_dict` understands."""
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
  """Makes the nested parts of a segment or its clips of dictionaries."""
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
def _round(seed: int, number: int, share: Fraction) -> np.ndarray:
  """Returns which steps of a round show clips: the same number in every round, in an order of its own."""
  order = np.argsort(np.random.Generator(np.random.Philox(key=[seed, number])).random(share.denominator))
  return order < share.numerator


def source_names(segments: Sequence[Segment]) -> list[str]:
  """Returns the names of the sources of all segments, each once, in the order in which they appear."""
  return list(dict.fromkeys(name for segment in segments for name in segment.all_sources()))


def total_steps(segments: Sequence[Segment]) -> int:
  """Returns the number of steps of the whole run."""
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
  """Returns how many samples each source has given before segment `index` begins; 0 for a source that is new there."""
  drawn: dict[str, int] = {name: 0 for segment in segments[: index + 1] for name in segment.all_sources()}
  for segment in segments[:index]:
    for modality in segment.modalities:
      for name, count in segment.draws(modality, segment.steps_of(modality, segment.steps)).items():
        drawn[name] += count
  return drawn


def draws_until(segments: Sequence[Segment], step: int) -> dict[str, int]:
  """Returns how many samples each source has given in the first `step` steps; an epoch is as many as it has."""
  done = truncate(segments, step)
  return cursors(done, len(done))


def pairs_before(segments: Sequence[Segment], index: int) -> int:
  """Returns the number of pairs in the steps before segment `index` begins."""
  return sum(segment.pairs for segment in segments[:index])


def truncate(segments: Sequence[Segment], step: int) -> tuple[Segment, ...]:
  """Returns the segments that make up the first `step` steps, which a run has done before others are appended."""
  kept: list[Segment] = []
  for segment in segments:
    steps = min(segment.steps, step - total_steps(kept))
    if steps > 0:
      kept.append(dataclasses.replace(segment, steps=steps))
  return tuple(kept)


def ahead(segments: Sequence[Segment], step: int) -> tuple[Segment, ...]:
  """Returns the segments that remain after `step` steps."""
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
  """Returns the segments of a run that goes on at `step`.

  Args:
    done: the segments of the checkpoint, those that were still to come included; empty for a new run.
    planned: the segments of the config as it is now.
    step: step of the checkpoint.
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
