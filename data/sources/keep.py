"""Filters of a set, such as "similarity > 0.28 and width >= 200": which of its samples are kept.

A filter is evaluated once, over whole columns, when a set is opened: what it keeps is then a list of row numbers, so
that samples are still found by number and an epoch is exact.
"""

import ast
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contrastive_jax.errors import UserError, nearest

Column = pa.Array | pa.ChunkedArray
Columns = Mapping[str, Column]
_COMPARISONS: dict[type[ast.cmpop], Callable] = {
  ast.Gt: pc.greater,
  ast.GtE: pc.greater_equal,
  ast.Lt: pc.less,
  ast.LtE: pc.less_equal,
  ast.Eq: pc.equal,
  ast.NotEq: pc.not_equal,
}
_JOINED: dict[type[ast.boolop], Callable] = {ast.And: pc.and_kleene, ast.Or: pc.or_kleene}
_GRAMMAR = "write comparisons of columns with values, joined by and, or and not, such as similarity > 0.28"


class Filter:
  """A filter that was parsed.

  Attributes:
    columns: names of the columns that it reads.
  """

  def __init__(self, text: str, known: Collection[str], name: str):
    """Parses a filter.

    Args:
      text: the filter. A column of which a sample has no value fits no comparison.
      known: names of the columns that there are.
      name: name of the set, for errors.

    Raises:
      UserError: if it cannot be read or names another column.
    """
    self._text, self._name = text, name
    try:
      self._tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
      raise self._refused("cannot be read") from None
    self.columns = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)})
    for column in self.columns:
      if column not in known:
        raise UserError(
          f"the filter {text!r} of {name!r} names {column!r}{nearest(column, known)}: its columns are"
          f" {', '.join(sorted(known))}"
        )
    if not self.columns:
      raise self._refused("names no column")
    self._check(self._tree)

  def kept(self, columns: Columns) -> np.ndarray:
    """Returns a truth value for each sample, of the columns that the filter reads.

    Raises:
      UserError: if a column cannot be compared with its value.
    """
    return self._evaluated(self._tree, columns).fill_null(False).to_numpy(zero_copy_only=False).astype(bool)

  def _check(self, node: ast.expr) -> None:
    match node:
      case ast.BoolOp(values=values):
        for value in values:
          self._check(value)
      case ast.UnaryOp(op=ast.Not(), operand=operand):
        self._check(operand)
      case ast.Compare(left=left, ops=ops, comparators=rest):
        for side, op, other in zip([left, *rest], ops, rest, strict=False):
          if type(op) not in _COMPARISONS or not self._is_side(side) or not self._is_side(other):
            raise self._refused("cannot be read")
      case _:
        raise self._refused("cannot be read")

  def _is_side(self, node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or _constant(node) is not None

  def _evaluated(self, node: ast.expr, columns: Columns) -> Column:
    match node:
      case ast.BoolOp(op=op, values=values):
        found = [self._evaluated(value, columns) for value in values]
        joined = found[0]
        for other in found[1:]:
          joined = _JOINED[type(op)](joined, other)
        return joined
      case ast.UnaryOp(operand=operand):
        return pc.invert(self._evaluated(operand, columns))
      case ast.Compare(left=left, ops=ops, comparators=rest):
        found = None
        for side, op, other in zip([left, *rest], ops, rest, strict=False):
          compared = self._compared(op, side, other, columns)
          found = compared if found is None else pc.and_kleene(found, compared)
        return found
    raise self._refused("cannot be read")

  def _compared(self, op: ast.cmpop, left: ast.expr, right: ast.expr, columns: Columns) -> Column:
    one, other = (columns[side.id] if isinstance(side, ast.Name) else _constant(side) for side in (left, right))
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
      raise self._refused("compares two values")
    try:
      return _COMPARISONS[type(op)](one, other)
    except (pa.ArrowException, TypeError):
      raise self._refused(f"compares {ast.unparse(left)} with {ast.unparse(right)}, of another type") from None

  def _refused(self, what: str) -> UserError:
    return UserError(f"the filter {self._text!r} of {self._name!r} {what}: {_GRAMMAR}")


def _constant(node: ast.expr) -> Any:
  """Returns the value of a number, with a sign or without, of a text or of a truth value; None for anything else."""
  try:
    value = ast.literal_eval(node)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return None
  return value if isinstance(value, bool | int | float | str) else None
