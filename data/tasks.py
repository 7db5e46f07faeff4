"""Evaluation sets by name."""

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.evaluation.benchmarks import BENCHMARKS, GENERIC_TEMPLATES
from contrastive_jax.evaluation.tasks import EvaluationSet, ReadSet
from data import benchmarks, emoji_evaluation, motion, strips
from data.emoji import LANGUAGES
from data.sources import folder, indexed, pictures, tfds
from data.sources.formats import FORMATS
from data.sources.indexed import IndexedSource
from data.sources.splits import overlap
from data.sources.table import TableSource

EVALUATIONS = emoji_evaluation.EVALUATIONS | motion.EVALUATIONS | strips.EVALUATIONS
# Sets of a person's own, by the beginning of their names.
OWN = ("table/", "folder/", *(f"{kind}/" for kind in FORMATS))
SHOWN_OWN = ("table/<file>", "folder/<folder>", *(f"{kind}/<files>" for kind in FORMATS))
# Sets of which a task may name features or columns.
WITH_KEYS = ("tfds/", "table/", *(f"{kind}/" for kind in FORMATS))
# What may be named of a TFDS set: the features of its images, its captions and its classes; of a table the first two,
# of a set in shards that of its captions.
KEYS = ("image_key", "caption_key", "label_key")
NO_KEYS: Mapping[str, str] = types.MappingProxyType({})
# Names that captions commonly have, the first that a set has is taken.
_CAPTIONS = ("captions", "caption")
# One name for several sets.
GROUPS = {
  "emoji_openmoji_languages": ("emoji_openmoji", *(f"emoji_openmoji_{language}" for language in LANGUAGES)),
  "sugarcrepe": tuple(name for name in BENCHMARKS if name.startswith("sugarcrepe/")),
}


def expand(names: Iterable[str]) -> list[str]:
  """Lists the sets that `--tasks` or a config names, with a group as its members, each set once; reads no data.

  Args:
    names: names of sets, with an optional "@<split>", or of `GROUPS`.

  Raises:
    UserError: for a name that is no task.
  """
  single = list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))
  for name in single:
    _check(name)
  return single


def load(
  name: str, data_dir: str = "", keys: Mapping[str, str] = NO_KEYS, hints: Mapping[str, Any] = NO_KEYS
) -> EvaluationSet:
  """Opens an evaluation set, as `opened` does, and reads its labels or captions."""
  return opened(name, data_dir, keys, hints)()


def opened(
  name: str, data_dir: str = "", keys: Mapping[str, str] = NO_KEYS, hints: Mapping[str, Any] = NO_KEYS
) -> ReadSet:
  """Opens an evaluation set: one of `EVALUATIONS`; or one of `BENCHMARKS`, "tfds/<set>", "table/<file>",
  "folder/<folder>" or a set in shards, such as "webdataset/<files>", with an optional "@<split>".

  The features of a TFDS set and the columns of a table are named behind it, as in
  "tfds/<set>@test:caption_key=title:image_key=photo".

  A TFDS set with labels and a folder of class folders are for zero-shot classification, sets with captions for
  retrieval. A benchmark has class names, prompts and splits of its own; its "@train" is what a probe may learn from.

  Args:
    name: name of one set, as `expand` returns it.
    data_dir: TFDS's directory of sets, which also has the folders of pictures; "" is TFDS's own default.
    keys: names of features, some of `KEYS`, for sets whose name does not say them. They must be there.
    hints: how a run read the set, such as the names of its features, which are tried first where neither says them.

  Returns:
    A function that reads the labels or captions of all records, once, and returns the set. For a TFDS set this can mean
    to read all pictures too, and a run that has just begun does not need it yet.

  Raises:
    UserError: for an unknown name, a feature that a set does not have, or data that is not on this machine.
  """
  _check(name)
  if name in EVALUATIONS:
    own = EVALUATIONS[name]()  # No record is read for the labels of these.
    return lambda: own
  known, split, named = parse(name)
  where = (data_dir or None, split_of(name))
  if known in BENCHMARKS:
    read = benchmarks.opened(BENCHMARKS[known], *where)
  elif name.startswith(OWN):
    read = _own(known, split, {**keys, **named}, hints)
  else:
    read = _tfds(known.removeprefix("tfds/"), *where, {**keys, **named}, hints)
  # Results are filed under this name, and those of another split must not replace them.
  return functools.cache(lambda: dataclasses.replace(read(), name=name))


def split_of(name: str) -> str:
  """Returns the split that a benchmark or "tfds/<set>" opens, in TFDS's notation."""
  known, split, _ = parse(name)
  if known not in BENCHMARKS:
    return split or "test"
  return {"": BENCHMARKS[known].split, "train": BENCHMARKS[known].train}.get(split, split)


def parse(name: str) -> tuple[str, str, dict[str, str]]:
  """Returns the set, the split ("" where none is named) and the features that a task name consists of.

  Args:
    name: the task name, such as "tfds/<set>@test:caption_key=title".

  Raises:
    UserError: if a feature is named that is none of `KEYS`, or of a set that has none with names.
  """
  # A version also stands behind a colon, but holds no "=".
  parts = name.split(":")
  options = [part for part in parts[1:] if "=" in part]
  known, _, split = ":".join(part for part in parts if part not in options).partition("@")
  named = {}
  for option in options:
    key, _, value = option.partition("=")
    require_known(f"task '{name}': feature", key, KEYS)
    named[key] = value
  if named and not known.startswith(WITH_KEYS):
    raise UserError(
      f"task '{name}' names features, which only sets of the forms tfds/<set>, table/<file> and of shards need: leave"
      " them out"
    )
  return known, split, named


def shared_records(first: str, second: str, data_dir: str = "") -> int:
  """Returns how many stored records two splits of one set share.

  Args:
    first: task name of a TFDS set, or of a benchmark that is one.
    second: task name of the same set.
    data_dir: TFDS's directory of sets; "" is TFDS's own default.

  Raises:
    UserError: if a set or a split is not there.
  """

  def stored(name: str) -> tfds.Records:
    known = parse(name)[0]
    dataset = BENCHMARKS[known].tfds if known in BENCHMARKS else known.removeprefix("tfds/")
    return tfds.Records(dataset, data_dir or None, split_of(name))

  return overlap(stored(first).ranges, stored(second).ranges)


# What an evaluation of a set in shards takes over from the run that reads it.
_OF_SHARDS = ("index", "filter", "caption_key", "wrong_caption_key", "classes", "templates")


def _own(name: str, split: str, keys: Mapping[str, str], hints: Mapping[str, Any]) -> ReadSet:
  place = f"{name}@{split}".removesuffix("@").partition("/")[2]
  kind = name.partition("/")[0]
  if kind != "folder":
    for key in {"label_key", *(["image_key"] if kind in FORMATS else [])} & keys.keys():
      raise UserError(f"task '{name}' is scored by the captions of its pictures: leave {key}={keys[key]} out")
  if kind in FORMATS:
    told = {key: hints[key] for key in _OF_SHARDS if hints.get(key)}
    return indexed.evaluated(IndexedSource(kind, place, **told | keys))
  if kind == "folder":
    return folder.evaluated(folder.open_folder(place, templates=hints.get("templates", GENERIC_TEMPLATES)))
  told = {key: hints[key] for key in ("image_key", "caption_key", "root", "filter") if hints.get(key)}
  return pictures.paired(TableSource(place, **told | keys))


def _tfds(name: str, data_dir: str | None, split: str, keys: Mapping[str, str], hints: Mapping[str, Any]) -> ReadSet:
  records = tfds.Records(name, data_dir, split)
  records.require(*keys.values())
  features = records.features
  image = keys.get("image_key") or _first(features, hints.get("image_key"), "image")
  if image is None:
    pictures = records.picture_keys
    if len(pictures) != 1:
      raise UserError(
        f"the TFDS set {name!r} has no feature 'image': name one of {', '.join(pictures or sorted(features))} with "
        f"--image_key, or as 'tfds/{name}:image_key=...'"
      )
    image = pictures[0]
  caption, label = keys.get("caption_key"), keys.get("label_key")
  if caption and label:
    raise UserError(f"the TFDS set {name!r} is scored by its captions or by its labels: name one of the two features")
  if not caption and not label:
    label = "label" if "label" in features else None
    caption = None if label else _first(features, _unless_common(hints.get("caption_key")), *_CAPTIONS)
    if not caption and not label:
      raise UserError(
        f"the TFDS set {name!r} has no feature 'label', 'captions' or 'caption': name its text, one of "
        f"{', '.join(records.text_keys) or 'none'}, with --caption_key, or its classes with --label_key"
      )
  # Training makes captions out of the names of classes; here a class is a label.
  if caption and getattr(features[caption], "names", None):
    caption, label = None, caption
  if label:
    return tfds.labelled(name, data_dir, split, image_key=image, label_key=label)
  return tfds.paired(name, data_dir, split, image_key=image, caption_key=caption)


def _first(features: Mapping, *names: str | None) -> str | None:
  return next((name for name in names if name and name in features), None)


def _unless_common(name: str | None) -> str | None:
  # The default of a config, "caption", does not prefer one caption to all that a record has.
  return None if name in _CAPTIONS else name


def _check(name: str) -> None:
  known = parse(name)[0]
  if not known.startswith(("tfds/", *OWN)) and known not in BENCHMARKS:
    require_known("task", name, (*EVALUATIONS, *GROUPS, *BENCHMARKS, "tfds/<set>", *SHOWN_OWN))
