"""The kinds of sources: how a set's name tells its kind, what opens sets of that kind, and the options of their own.

A new format is one file in `data/sources` and one line in `KINDS`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from ml_collections import ConfigDict

from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.inputs import templates
from contrastive_jax.schedule.stages import source_options
from data import emoji, motion, strips
from data.files import Files
from data.sources import Source
from data.sources.clips import ClipSource
from data.sources.folder import open_folder
from data.sources.formats import FORMATS
from data.sources.indexed import IndexedSource
from data.sources.table import TableSource
from data.sources.tfds import TfdsSource

# The options that an entry of `data.sources` gives a set, beside its name and weight.
Options = Mapping[str, Any]
Opened = Mapping[str, Source]
# Opens sets of one kind, given the options of each by its name, and `config.data`.
Open = Callable[[Mapping[str, Options], Any], Opened]
_FEATURES = ("image_key", "caption_key")
# The name of a field, or weights of several.
WEIGHTED = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of source.

  Attributes:
    shown: how the name of such a set is written, for errors.
    open: opens such sets.
    options: the type of each option that such a set has of its own.
    attribution: what its licence asks to be printed.
  """

  shown: str
  open: Open
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  attribution: str = ""


def _emoji(make: Callable[[emoji.CaptionMix], Opened]) -> Open:
  def opened(wanted: Mapping[str, Options], data: Any) -> Opened:
    sources = make(emoji.CaptionMix(**data.captions))
    return {name: sources[name] for name in wanted}

  return opened


def _tfds(wanted: Mapping[str, Options], data: Any) -> Opened:
  def opened(name: str, options: Options) -> TfdsSource:
    dataset, _, split = name.removeprefix("tfds/").partition("@")
    if split and "split" in options:
      raise UserError(f"data.sources has {name!r} with split={options['split']!r}: give the split in one of the two")
    shared = {"split": split or "train", "image_key": data.image_key, "caption_key": data.caption_key}
    return TfdsSource(dataset, data.data_dir or None, **shared | options)

  return {name: opened(name, options) for name, options in wanted.items()}


def _table(wanted: Mapping[str, Options], data: Any) -> Opened:
  keys = {"image_key": data.image_key, "caption_key": data.caption_key}
  return {name: TableSource(name.partition("/")[2], **keys | options) for name, options in wanted.items()}


def _indexed(kind: str) -> Open:
  def opened(wanted: Mapping[str, Options], data: Any) -> Opened:
    reader = Files(cache_bytes=data.cache_bytes, cache_dir=data.cache_dir or None)
    return {
      name: IndexedSource(kind, name.partition("/")[2], **options, reader=reader) for name, options in wanted.items()
    }

  return opened


def each(make: Callable[..., Source]) -> Open:
  """Returns what opens each set by itself: `make` gets what its name says behind the first slash, and its options."""

  def opened(wanted: Mapping[str, Options], _data: Any) -> Opened:
    return {name: make(name.partition("/")[2], **options) for name, options in wanted.items()}

  return opened


_TRAINING, _STRIPS, _MOTION = (
  _emoji(make) for make in (emoji.training_sources, lambda _: strips.strip_sources(), motion.motion_sources)
)
# A name is one of these or begins with one of them that ends in a slash.
KINDS: dict[str, Kind] = {
  **{
    name: Kind(name, _TRAINING, attribution=emoji.ATTRIBUTION)
    for name in ("noto", "twemoji", "noto_tones", "twemoji_tones")
  },
  **{name: Kind(name, _STRIPS, attribution=emoji.ATTRIBUTION) for name in ("strips_noto", "strips_twemoji")},
  **{name: Kind(name, _MOTION, attribution=emoji.ATTRIBUTION) for name in ("motion_noto", "motion_twemoji")},
  "tfds/": Kind(
    "tfds/<set>",
    _tfds,
    {"image_key": str, "caption_key": str, "split": str, "templates": tuple[str, ...], "flip": bool},
  ),
  "table/": Kind(
    "table/<file>",
    _table,
    {
      **dict.fromkeys(("image_key", "root", "filter", "weight_key", "wrong_caption_key"), str),
      "caption_key": WEIGHTED,
      "flip": bool,
    },
  ),
  "folder/": Kind("folder/<folder>", each(open_folder), {"templates": tuple[str, ...], "flip": bool}),
  "clips/": Kind("clips/<folder>", each(ClipSource), {"flip": bool}),
  **{
    f"{kind}/": Kind(
      f"{kind}/<files>",
      _indexed(kind),
      {
        **dict.fromkeys(("index", "filter", "group_key", "weight_key", "wrong_caption_key", "classes"), str),
        "caption_key": WEIGHTED,
        "templates": tuple[str, ...],
        "flip": bool,
      },
    )
    for kind in FORMATS
  },
}


def kind_of(name: str) -> Kind:
  """Returns the kind of a set by its name.

  Raises:
    UserError: for a name of no kind.
  """
  first, slash, _ = name.partition("/")
  key = first + slash
  if key not in KINDS:
    require_known("data.sources", name, [kind.shown for kind in KINDS.values()])
  return KINDS[key]


def open_sources(config: ConfigDict, names: Iterable[str]) -> dict[str, Source]:
  """Opens sets by name, each with the options that its entry in the config gives it.

  Args:
    config: the config of a run.
    names: the names of the sets, such as "noto", "tfds/<set>@<split>" or "clips/<folder>".

  Raises:
    UserError: for an unknown name, an option that a set of its kind does not have, or data that is not on this machine.
  """
  options = source_options(config)
  wanted: dict[Open, dict[str, Options]] = {}
  for name in names:
    kind, own = kind_of(name), _of_the_set(options.get(name, {}))
    wanted.setdefault(kind.open, {})[name] = {key: _checked(name, kind, key, value) for key, value in own.items()}
  return {name: source for open_all, sets in wanted.items() for name, source in open_all(sets, config.data).items()}


def _of_the_set(own: Options) -> dict[str, Any]:
  """Returns the options of a set that say how it is read: the terms that it takes part in are those of a run."""
  return {key: value for key, value in own.items() if key != "terms"}


def _checked(name: str, kind: Kind, key: str, value: Any) -> Any:
  if key not in kind.options:
    known = ", ".join(("name", "weight", "terms", *kind.options))
    raise UserError(f"data.sources gives {name!r} the option {key!r}{nearest(key, kind.options)}: it takes {known}")
  expected = kind.options[key]
  if expected == WEIGHTED:
    return _weighted(name, key, value)
  if get_args(expected):
    return tuple(templates(value, f"{key} of {name!r} in data.sources"))
  if not isinstance(value, expected) or value == "":
    kinds = {str: "a text that is not empty", bool: "True or False"}
    raise UserError(f"data.sources gives {name!r} {key}={value!r}, which must be {kinds[expected]}")
  return value


def _weighted(name: str, key: str, value: Any) -> str | dict[str, float]:
  if isinstance(value, str) and value:
    return value
  weights = dict(value) if isinstance(value, Mapping) else {}
  for field, weight in weights.items():
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
      raise UserError(f"data.sources gives {name!r} {key} with {field}={weight!r}: a weight is a number above 0")
  if not weights:
    raise UserError(
      f"data.sources gives {name!r} {key}={value!r}, which must be the name of a field or weights of some"
    )
  return {str(field): float(weight) for field, weight in weights.items()}


def hints(config: ConfigDict | Mapping[str, Any], task: str) -> dict[str, Any]:
  """Returns how a run read a set that a task is on, its features above all; of another set, how it reads most sets.

  Args:
    config: a config, or the dictionary that was read from `config.json`; imported weights have no data in it.
    task: the evaluation task, such as "tfds/coco_captions@test".
  """
  data = config.get("data", {})
  # Sets in shards know their fields by their index.
  shared = () if task.partition("/")[0] in FORMATS else _FEATURES
  names = {key: data[key] for key in shared if data.get(key)}
  for name, own in source_options(config).items() if data else ():
    dataset = name.partition("@")[0]
    if task == dataset or task.startswith((f"{dataset}@", f"{dataset}:")):
      names |= _of_the_set(own)
  return names
