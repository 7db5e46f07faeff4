"""The stages of a curriculum, as a config lists them, and the segments that they become."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from contrastive_jax.errors import UserError, fields_of
from contrastive_jax.models.presets import plain
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.segments import Clips, Rows, Segment


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stretch of training, as `config.curriculum` lists them.

  Attributes:
    name: name of the stage in the report.
    steps: number of steps; the last stage may say 0 for the rest of `total_steps`.
    batch_size: number of pairs of a step; 0 is that of the run.
    sources: the sources of images, as `weighted_sources` reads them; empty are those of `data.sources`.
    mode: "fixed", "native" or "naflex", which `preprocess.resolution.Resolution` explains with the next four.
    size: side of an image in pixels; 0 is that of the image tower.
    min_tokens: the fewest patches of an image.
    max_tokens: the most patches of an image.
    lengths: sequence lengths in tokens.
    rows: number of rows that the images of a pack share (`data.pack_pairs` images); 0 gives each a row of its own.
    row_length: length of these rows in tokens.
    drop_patches: share of the patches of each image, or clip, that are dropped; None is that of `data.drop_patches`.
    text_length: number of tokens that captions are cut to, as `data.long_captions` says; 0 is `model.text.length`.
    text_rows: number of rows that the captions of a pack share; 0 is `data.text_rows`.
    text_row_length: length of these rows in tokens.
    learning_rate: factor of the schedule.
    warmup_steps: number of steps over which that factor grows from 0.
    weights: factors of the weights of terms, by their names: a number, or those at the beginning and at the end of the
      stage, linear between.
    distillation: factor of all distillation terms at the beginning and at the end of the stage, linear between; where
      it is 0 at both, the teacher does not run.
    video_share: share of the steps that show clips instead of images.
    video_sources: the weight of each source of clips, by its name.
    frames: number of frames of a clip.
    frame_rule: the rule by which frames are chosen, "uniform", "random" or "fps".
    frame_rate: number of frames a second, for "fps".
    video_size: side of the frames in pixels; 0 is `size`. It is ignored with `video_max_tokens`.
    video_max_tokens: the most patches of a clip at native resolution; 0 shows clips at fixed resolution.
    video_rows: number of rows that the clips of a pack share; 0 gives each a row of its own.
    video_row_length: length of these rows in tokens.
  """

  name: str = ""
  steps: int = 0
  batch_size: int = 0
  sources: dict[str, Any] = dataclasses.field(default_factory=dict)
  mode: str = "fixed"
  size: int = 0
  min_tokens: int = 1
  max_tokens: int = 0
  lengths: tuple[int, ...] = ()
  rows: int = 0
  row_length: int = 0
  drop_patches: float | None = None
  text_length: int = 0
  text_rows: int = 0
  text_row_length: int = 0
  learning_rate: float = 1.0
  warmup_steps: int = 0
  weights: dict[str, Any] = dataclasses.field(default_factory=dict)
  distillation: tuple[float, float] = (1.0, 1.0)
  video_share: float = 0.0
  video_sources: dict[str, Any] = dataclasses.field(default_factory=dict)
  frames: int = 8
  frame_rule: str = "random"
  frame_rate: float = 0.0
  video_size: int = 0
  video_max_tokens: int = 0
  video_rows: int = 0
  video_row_length: int = 0

  def ends_of_weight(self, term: str) -> tuple[float, float]:
    """Returns the factors of a term's weight at the beginning and at the end of the stage.

    Raises:
      UserError: if `weights` gives the term something else than a number or two.
    """
    factor = self.weights.get(term, 1.0)
    ends = tuple(factor) if isinstance(factor, Sequence) and not isinstance(factor, str) else (factor, factor)
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
      raise UserError(
        f"weights of stage '{self.name}' gives {term} the factor {factor!r}: give it a number, or two for the beginning"
        " and the end of the stage"
      )
    return float(ends[0]), float(ends[1])


def stages_of(config: ConfigDict) -> tuple[Stage, ...]:
  """Returns the stages of a config, a single one where `curriculum` is empty.

  Raises:
    UserError: if their steps do not add up to `total_steps`.
  """
  listed = map(plain, config.curriculum)
  stages = [Stage(**stage) for stage in listed] or [Stage()]
  rest = config.total_steps - sum(stage.steps for stage in stages[:-1])
  last = stages[-1]
  for number, stage in enumerate(stages[:-1]):
    if stage.steps < 1:
      raise UserError(f"curriculum.{number}.steps={stage.steps} must be at least 1: only the last may be 0, the rest")
  if rest < 1 or last.steps not in (0, rest):
    parts = " + ".join(str(stage.steps) for stage in stages)
    raise UserError(
      f"total_steps={config.total_steps} is not the sum of the curriculum's steps ({parts}):"
      " change it, or give the last stage steps=0, which means the rest"
    )
  return (*stages[:-1], dataclasses.replace(last, steps=rest))


def segments_of(config: ConfigDict) -> tuple[Segment, ...]:
  """Returns the segment that each stage of a config becomes."""
  return tuple(_segment(config, stage, f"curriculum.{number}") for number, stage in enumerate(stages_of(config)))


def _segment(config: ConfigDict, stage: Stage, where: str) -> Segment:
  size = stage.size or config.model.image.image_size
  clips = None
  if stage.video_share:
    if not stage.video_sources:
      raise UserError(f"{where}.video_share={stage.video_share} needs clips: name some in {where}.video_sources")
    if config.model.image.tubelet < 2:
      raise UserError(
        f"{where}.video_share={stage.video_share} shows clips, and model.image.tubelet={config.model.image.tubelet}"
        " reads single images: make it at least 2"
      )
    if stage.frames % config.model.image.tubelet:
      raise UserError(
        f"{where}.frames={stage.frames} must be a multiple of model.image.tubelet={config.model.image.tubelet}"
      )
    native = Resolution("native", min_tokens=1, max_tokens=stage.video_max_tokens) if stage.video_max_tokens else None
    sources = weighted_sources(f"{where}.video_sources", stage.video_sources)
    with fields_of(where):
      clips = Clips(
        sources,
        stage.video_share,
        native or Resolution.fixed(stage.video_size or size),
        stage.frames,
        stage.frame_rule,
        stage.frame_rate,
        _rows("video_", stage.video_rows, stage.video_row_length),
        config.seed,
      )
  with fields_of(where):
    resolution = Resolution(stage.mode, size, stage.min_tokens, stage.max_tokens, stage.lengths)
    rows = _rows("", stage.rows, stage.row_length)
    text_rows = _rows("text_", stage.text_rows, stage.text_row_length)
  own = f"{where}.sources", stage.sources
  named = own if stage.sources else ("data.sources", config.data.sources.to_dict())
  return Segment(
    steps=stage.steps,
    batch_size=stage.batch_size or config.batch_size,
    sources=weighted_sources(*named),
    resolution=resolution,
    name=stage.name,
    rows=rows,
    pack_pairs=config.data.pack_pairs,
    captions_per_image=config.data.captions_per_image,
    clustered=bool(config.data.clusters),
    drop_patches=config.data.drop_patches if stage.drop_patches is None else stage.drop_patches,
    text_rows=text_rows or _rows("data.text_", config.data.text_rows, config.data.text_row_length),
    text_length=stage.text_length,
    clips=clips,
    taught=bool(config.distillation.teacher or config.distillation.targets) and max(stage.distillation) > 0,
  )


def weighted_sources(field: str, sources: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
  """Returns the names and weights of a config's sources, sorted by name.

  Args:
    field: name of the field in errors.
    sources: the name and weight of each source, or a label and `{"name": ..., "weight": ...}`: a key of a config cannot
      hold the dot of a name such as "tfds/coco_captions:1.1.0", and a value can. The weight is 1 when it is left out.
      What else such an entry holds are options of the set, see `source_options`.

  Raises:
    UserError: for an entry without a name, a weight that is not above 0, or a name given twice.
  """
  weights: dict[str, float] = {}
  for name, weight, _ in _entries(field, sources):
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:
      raise UserError(f"{field} gives {name!r} the weight {weight!r}: a weight is a number above 0")
    if name in weights:
      raise UserError(f"{field} names {name!r} twice: give it one entry")
    weights[name] = float(weight)
  return tuple(sorted(weights.items()))


def source_options(config: Mapping[str, Any] | Any) -> dict[str, dict[str, Any]]:
  """Returns the sources that a config names, and the options that entries give each beside its name and weight.

  Args:
    config: a config, or the dictionary that was read from `config.json`.

  Raises:
    UserError: if two entries give one set other options.
  """
  config = plain(config)
  fields = {"data.sources": config["data"].get("sources", {})}
  for number, stage in enumerate(map(plain, config.get("curriculum", ()))):
    fields |= {f"curriculum.{number}.{name}": stage.get(name) or {} for name in ("sources", "video_sources")}
  found: dict[str, dict[str, Any]] = {}
  for field, sources in fields.items():
    for name, _, own in _entries(field, sources):
      before = found.get(name)
      if own and before and before != own:
        raise UserError(f"{field} gives {name!r} the options {own}, and an entry before it {before}: make them equal")
      found[name] = own or before or {}
  return found


def _entries(field: str, sources: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
  """Yields the name, the weight and the options of each source."""
  for label, entry in sources.items():
    if not isinstance(entry, Mapping):
      yield label, entry, {}
      continue
    if not isinstance(entry.get("name"), str) or not entry["name"]:
      raise UserError(f"{field}.{label} has no name: give it one, such as 'tfds/coco_captions:1.1.0'")
    own = {key: value for key, value in entry.items() if key not in ("name", "weight")}
    yield entry["name"], entry.get("weight", 1.0), own


def source_terms(config: Mapping[str, Any] | Any) -> dict[str, tuple[str, ...]]:
  """Returns the terms of the objective that sources take part in, of those sources whose entries say so.

  Raises:
    UserError: for an entry whose `terms` are no list of names.
  """
  found = {}
  for name, own in source_options(config).items():
    terms = own.get("terms", ())
    if isinstance(terms, str) or not isinstance(terms, Sequence) or not all(isinstance(term, str) for term in terms):
      raise UserError(f"data.sources gives {name!r} terms={terms!r}, which must be a list of names of terms")
    if "terms" in own:
      found[name] = tuple(terms)
  return found


def _rows(prefix: str, count: int, length: int) -> Rows | None:
  if bool(count) != bool(length):
    raise UserError(f"{prefix}rows={count} and {prefix}row_length={length} go together: give both, or leave both at 0")
  return Rows(count, length) if count else None


def first_steps(stages: Sequence[Stage]) -> list[tuple[str, int]]:
  """Returns the name of each stage, and the number of steps before it."""
  ends = itertools.accumulate((stage.steps for stage in stages), initial=0)
  return [(stage.name, before) for stage, before in zip(stages, ends, strict=False)]
