"""The fields of a config: one table of their names and types, compared with every config whatever made it.

A field of `configs/common.py` that is missing here, or the other way round, fails `tests/training/test_fields.py`.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax import runs
from contrastive_jax.errors import UserError, closest, nearest
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.others import OTHERS
from contrastive_jax.objectives import TERMS, term_options
from contrastive_jax.schedule.stages import Stage

# Of a task or a regular expression each.
Names = tuple[str, ...]
# Whole mappings whose names are the user's: labels and names of sources.
Sources = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Node:
  """A part of a config that has fields.

  Attributes:
    fields: the type of each field by its name, or the node that it is.
    complete: whether every field must be there; else a field that is left out has a default.
    every: the node that each item of a list is, where the part is a list.
  """

  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  complete: bool = True
  every: "Node | None" = None

  def part(self, name: str) -> Any:
    """Returns the type or the node of a field, or of an item of a list by its number; None where there is none."""
    return self.every if self.every is not None and name.isdecimal() else self.fields.get(name)


_SEE = "see configs/common.py for the fields"
# Fields of dataclasses that a config says in another place.
_ELSEWHERE = {"model.dtype": "compute_dtype"}


def _dataclass(kind: type, *left_out: str) -> Node:
  """Returns the fields of a dataclass and of those within it."""
  hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in left_out}
  nested = {name: _dataclass(hint) if dataclasses.is_dataclass(hint) else hint for name, hint in hints.items()}
  return Node(nested, complete=False)


def _model() -> Node:
  """Returns the fields of a model; an entry of `others` may have those of any tower in the table."""
  model = _dataclass(DualEncoderConfig, "dtype", "others")
  others = {name: kind for tower in OTHERS.values() for name, kind in _dataclass(tower).fields.items()}
  entry = Node({"name": str, **others}, complete=False)
  return dataclasses.replace(model, fields={**model.fields, "others": Node(every=entry)})


# Those of `data.augment.Augment`, which the library does not know.
_AUGMENT = Node(
  {
    **dict.fromkeys(("zoom", "saturation", "contrast"), tuple[float, float]),
    **dict.fromkeys(("stretch", "rotate", "shear", "shift", "flip", "background", "colour"), float),
    **dict.fromkeys(("hue", "brightness", "grey", "outline", "flatten", "unfill", "blur"), float),
  },
  complete=False,
)


def known() -> Node:
  """Returns the fields of a run's config."""
  options = {
    term: Node({name: option.type for name, option in known.items()}, complete=False)
    for term, known in term_options().items()
  }
  return Node(
    {
      "name": str,
      "seed": int,
      "total_steps": int,
      "batch_size": int,
      "accumulation": int,
      "loss": str,
      "objective": Node(dict.fromkeys(TERMS, float), complete=False),
      "loss_dtype": str,
      "loss_options": Node(options, complete=False),
      # `compute_dtype` of the run is the type of its model.
      "model": _model(),
      "compute_dtype": str,
      "max_logit_scale": float,
      "frozen": Names,
      "init_from": str,
      "init_model": str,
      "init_towers": str,
      "optimizer": Node(
        {
          "name": str,
          **dict.fromkeys(("learning_rate", "weight_decay", "clip_norm", "b1", "b2", "eps"), float),
          **dict.fromkeys(("adafactor_decay", "muon_learning_rate", "muon_beta", "muon_rms"), float),
        }
      ),
      "schedule": Node(
        {
          "name": str,
          "warmup_steps": int,
          "end_factor": float,
          "timescale": float,
          "cooldown_steps": int,
          "on_growth": str,
        }
      ),
      "average_decay": float,
      "tokenizer": Node({"spec": str, "lowercase": bool, "straight_quotes": bool}),
      "data": Node(
        {
          "sources": Sources,
          **dict.fromkeys(("data_dir", "image_key", "caption_key"), str),
          "captions": Node({"english": float, "aliases": float, "templates": Names, "bare": float}, complete=False),
          "augment": _AUGMENT,
          "strong_augment": _AUGMENT,
          "text_augment": Node(
            dict.fromkeys(("stop_words", "swap", "delete", "insert", "share"), float), complete=False
          ),
          "long_captions": str,
          "swap_words": bool,
          "clusters": str,
          "captions_per_image": int,
          "drop_patches": float,
          **dict.fromkeys(("threads", "workers", "prefetch_bytes", "cache_bytes"), int),
          "cache_dir": str,
          "max_bad_share": float,
          **dict.fromkeys(("pack_pairs", "text_rows", "text_row_length"), int),
        }
      ),
      "curriculum": Node(every=_dataclass(Stage)),
      "distillation": Node({"teacher": str, "targets": str, "replay": Names, "dim": int}),
      "mesh": Node(dict.fromkeys(("data", "fsdp", "tensor"), int)),
      "log_every": int,
      "log_sample_ids": bool,
      **dict.fromkeys(("checkpoint_every", "checkpoint_keep_last", "checkpoint_keep_every", "eval_every"), int),
      "evals": Names,
      "final_evals": Names,
      "on_nonfinite": str,
      "max_skipped_steps": int,
      "profile_steps": tuple[int, ...],
      "wandb_project": str,
      "workdir_mirror": str,
    }
  )


def check_fields(config: Mapping[str, Any]) -> None:
  """Compares the names and types of a config with the table.

  Args:
    config: the config as nested dictionaries and lists, as JSON holds them.

  Raises:
    UserError: for the first field that is unknown, missing or of another type, with the nearest known name.
  """
  _check(config, known(), "")


def checked_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the config of a run as `runs.read_config` does, once the types of its fields are those of the table.

  Fields may be missing or unknown: other versions have others, and imported weights have none of training. Those of a
  stage and of another tower are all known, since one that is misspelt would change how images are seen.

  Raises:
    UserError: if the directory is not a run, or its `config.json` is damaged or has a field of another type.
  """
  config = runs.read_config(workdir)
  try:
    _check(config, known(), "", stored=True)
  except UserError as error:
    raise UserError(f"{Path(workdir) / 'config.json'} is no config: {error}; put back the original") from None
  return config


def unknown_field(name: str, siblings: Iterable[str] = ()) -> str:
  """Returns a sentence about a field that a config does not have, with the nearest name.

  Args:
    name: full name of the field, such as "optimizer.lr" or "curriculum[0].step".
    siblings: names that the part of the config has which should hold the field.
  """
  *parents, last = re.findall(r"[^.\[\]]+", name)
  node: Any = known()
  for parent in parents:
    node = node.part(parent)
    if not isinstance(node, Node):
      where, entries = name.removesuffix(f".{last}"), list(siblings)
      return (
        f"{where} has no entry '{last}'{nearest(last, entries)}, it has {', '.join(entries) or 'none'}: to add one,"
        f" give all of {where}"
      )
  if last in node.fields:
    whole = f": give all of {name.rpartition('.')[0]}" if not node.complete else ", which every run has"
    return f"the config lacks {name}{whole}"
  return _unknown(last, node, ".".join(parents))


def kind_in_words(name: str) -> str | None:
  """Returns what the value of a field is, such as "a whole number", by its full name; None for an unknown field."""
  node: Any = known()
  for part in re.findall(r"[^.\[\]]+", name):
    if not isinstance(node, Node):
      return None
    node = node.part(part)
  return None if node is None else _said(node)


def names(node: Node | None = None, prefix: str = "") -> Iterator[str]:
  """Yields the full name of every field; those of a list's items once, with its name alone."""
  for name, kind in (known() if node is None else node).fields.items():
    yield f"{prefix}{name}"
    if isinstance(kind, Node):
      yield from names(kind.every or kind, f"{prefix}{name}.")


def _check(value: Any, kind: Any, name: str, *, stored: bool = False) -> None:
  """Raises a `UserError` for a value that does not fit; outside lists, what is `stored` may have other fields."""
  if not isinstance(kind, Node):
    if not _is_a(value, kind):
      raise UserError(f"{name}={value!r} must be {_said(kind)}")
  elif kind.every is not None:
    if not isinstance(value, list | tuple):
      raise UserError(f"{name}={value!r} must be {_said(kind)}")
    for index, item in enumerate(value):
      _check(item, kind.every, f"{name}.{index}")
  else:
    if not isinstance(value, Mapping):
      raise UserError(f"{name}={value!r} must be {_said(kind)}")
    for field in value:
      if field not in kind.fields and not stored:
        raise UserError(_unknown(field, kind, name))
    for field, inner in kind.fields.items():
      full = f"{name}.{field}" if name else field
      if field in value:
        _check(value[field], inner, full, stored=stored)
      elif kind.complete and not stored:
        raise UserError(f"the config lacks {full}: start from configs/common.py, which has every field")


def _unknown(field: str, node: Node, where: str) -> str:
  full, place = (f"{where}.{field}", where) if where else (field, "the config")
  elsewhere = {name.rpartition(".")[2]: name for name in reversed(list(names())) if not name.startswith("curriculum.")}
  # The right name in the wrong place, a name like it in this place, a name like it anywhere.
  meant = _ELSEWHERE.get(full) or elsewhere.get(field) or closest(field, node.fields)
  meant = meant or elsewhere.get(closest(field, elsewhere) or "")
  if meant:
    return f"the config has no field '{full}' (did you mean '{meant}'?)"
  return f"the config has no field '{full}': " + (f"{place} has {', '.join(node.fields)}" if where else _SEE)


def _is_a(value: Any, kind: Any) -> bool:
  """Says whether a value may stand in a field; a whole number will do for a number, and a list for a tuple."""
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return any(_is_a(value, part) for part in parts)
  if origin is tuple:
    several = parts[1:] == (...,)
    if not isinstance(value, list | tuple) or not (several or len(value) == len(parts)):
      return False
    return all(
      _is_a(item, part) for item, part in zip(value, parts[:1] * len(value) if several else parts, strict=True)
    )
  if origin is dict:
    return isinstance(value, Mapping)
  if origin is typing.Literal:
    return value in parts
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  return type(value) is kind or (kind is types.NoneType and value is None)


def _said(kind: Any) -> str:
  """Puts a type, or a part of a config, in words."""
  if isinstance(kind, Node):
    what, shown = ("a part", kind) if kind.every is None else ("a list, each item", kind.every)
    return f"{what} with the fields {', '.join(shown.fields)}"
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return " or ".join(_said(part) for part in parts)
  if origin is tuple:
    count = "" if parts[1:] == (...,) else f"{len(parts)} "
    return f"a list of {count}{_PLURALS[parts[0]]}"
  if origin is dict:
    return "a mapping of names"
  if origin is typing.Literal:
    return " or ".join(repr(part) for part in parts)
  return _WORDS[kind]


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}
