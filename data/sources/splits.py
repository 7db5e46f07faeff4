"""Splits in TFDS's notation as ranges of records, such as "train[80%:]" or "train[:10]+test"."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from contrastive_jax.errors import UserError, nearest

_GRAMMAR = "write it as TFDS does, such as train, train[80%:], train[:100]+test or all"


class Range(NamedTuple):
  """Records `start` to `stop` (exclusive) of a stored split."""

  split: str
  start: int
  stop: int


def ranges(spec: str, infos: Mapping[str, Any], name: str) -> list[Range]:
  """Returns the stored records that a split stands for, in TFDS's order; TFDS itself parses and rounds.

  Args:
    spec: the split.
    infos: TFDS's information about each stored split, by name.
    name: name of the set, for errors.

  Raises:
    UserError: if this is no split, the set does not have it, or it holds no record.
  """
  import tensorflow_datasets as tfds  # Half a second, which only readers of such sets pay.

  try:
    parsed = tfds.core.splits.AbstractSplit.from_spec(spec)
  except NotImplementedError:
    raise UserError(f"split {spec!r} of the TFDS set {name!r}: TFDS does not slice 'all', name its splits") from None
  except ValueError:
    raise UserError(f"split {spec!r} of the TFDS set {name!r} cannot be read: {_GRAMMAR}") from None
  for part in _named(parsed):
    if part not in infos:
      known = ", ".join(sorted(infos))
      raise UserError(f"the TFDS set {name!r} has no split {part!r}{nearest(part, infos)}, it has {known}")
  try:
    parts = parsed.to_absolute(infos)
  except ValueError as error:
    raise UserError(f"split {spec!r} of the TFDS set {name!r}: {str(error).rstrip('.')}, {_GRAMMAR}") from None
  found = [
    Range(part.splitname, part.from_ or 0, infos[part.splitname].num_examples if part.to is None else part.to)
    for part in parts
  ]
  backwards = next((part for part in found if part.start > part.stop), None)
  if backwards:
    # TFDS reads other records than these, or none.
    shown = f"{backwards.split}[{backwards.start}:{backwards.stop}]"
    raise UserError(f"split {spec!r} of the TFDS set {name!r}: its part {shown} ends before it begins")
  found = [part for part in found if part.start < part.stop]
  if not found:
    sizes = ", ".join(f"{key} has {info.num_examples}" for key, info in sorted(infos.items()))
    raise UserError(f"split {spec!r} of the TFDS set {name!r} holds no record: {sizes}")
  return found


def overlap(first: Sequence[Range], second: Sequence[Range]) -> int:
  """Returns how many stored records two splits share, each pair of ranges counted on its own."""
  return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a in first for b in second if a.split == b.split)


def _named(parsed: Any) -> list[str]:
  """Yields the names of the stored splits that a parsed split is made of; "all" names none."""
  if hasattr(parsed, "left"):
    return _named(parsed.left) + _named(parsed.right)
  return [parsed.split_name] if hasattr(parsed, "split_name") else []
