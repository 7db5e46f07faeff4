"""Sums and log-sum-exps over the negatives of every row and column, of any function of a tile.

`negatives.py` knows the derivatives of the two common losses by heart. Here JAX derives a tile at a time, so that a
loss is written as what it computes of a tile: more products than by heart, and as little memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses import pairwise
from contrastive_jax.losses.exponentials import only_negatives
from contrastive_jax.losses.negatives import Sweep, accumulation_dtype
from contrastive_jax.losses.reductions import LogSumExp, Sum, finite


@dataclasses.dataclass(frozen=True)
class Reduction:
  """What becomes of one matrix.

  Attributes:
    axis: the axis that is reduced: 1 gives a number for each row (image), 0 for each column (text).
    logarithm: whether the log-sum-exp is taken, which is minus infinity without negatives; else the sum.
  """

  axis: int
  logarithm: bool = False


ROW_SUM, COLUMN_SUM = Reduction(1), Reduction(0)
ROW_LOG_SUM_EXP, COLUMN_LOG_SUM_EXP = Reduction(1, logarithm=True), Reduction(0, logarithm=True)

# `matrices(rows, columns)` of a tile, one for each reduction, in which minus infinity leaves a negative out of a
# log-sum-exp. It closes over numbers only: what it is differentiated by are the arrays of the rows and columns.
Matrices = Callable[[Any, Any], tuple[Float[Array, "a b"], ...]]


def reduce_negatives(
  matrices: Matrices,
  reductions: tuple[Reduction, ...],
  rows: Any,
  columns: Any,
  keys: pairwise.Keys,
  sweep: Sweep,
  column_keys: pairwise.Keys | None = None,
) -> tuple[Float[Array, "pairs"], ...]:
  """Reduces matrices that a function makes of every tile over the pairs that share no key.

  Args:
    matrices: the function of a slice of `rows` and a slice of `columns`. It sees them as float32 or wider.
    reductions: what becomes of each of its matrices.
    rows: pytree of float arrays with this device's rows as leading axis.
    columns: pytree of float arrays with this device's columns as leading axis.
    keys: keys of this device's rows.
    sweep: mesh axes, strategy and tile.
    column_keys: keys of its columns, one for each of `keys`; None for the same. Those in one place are compared.

  Returns:
    A vector over this device's rows or columns for each reduction, differentiable in `rows` and `columns`.
  """
  both_keys = keys, keys if column_keys is None else column_keys
  args = pairwise.vary((rows, columns, both_keys), rows, columns, axes=sweep.axes)
  return _reduced(matrices, reductions, sweep, *args)


def to_rows(scalar: Float[Array, ""], like: Float[Array, "pairs dim"], axes: tuple[str, ...]) -> Float[Array, "pairs"]:
  """Gives every row a scalar of its own, which makes the scalar's gradient a sum over rows."""
  return jnp.broadcast_to(pairwise.vary(scalar, like, axes=axes), (len(like),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _reduced(matrices, reductions, sweep, rows, columns, keys):
  return _forward(matrices, reductions, sweep, rows, columns, keys)[0]


def _forward(matrices, reductions, sweep, rows, columns, keys):
  dtype, count = accumulation_dtype(*jax.tree.leaves((rows, columns))), len(jax.tree.leaves(rows)[0])
  of_tile = _varying(matrices)
  sweep = sweep.in_one_tile_if_small(count)

  def tile_fn(rows, columns, fresh):
    found = of_tile(_wide(rows[0], dtype), _wide(columns[0], dtype))
    mask = _mask(found[0].shape, rows[1], columns[1], fresh)
    parts = [_reduce(reduction, matrix, mask) for reduction, matrix in zip(reductions, found, strict=True)]
    return _apart(reductions, parts)

  def empty(reduction):
    return LogSumExp.empty((count,), dtype) if reduction.logarithm else Sum.empty((count,), dtype)

  empties = _apart(reductions, [empty(reduction) for reduction in reductions])
  of_rows, of_columns = map(iter, sweep(tile_fn, (rows, keys[0]), (columns, keys[1]), empties))
  totals = [next(of_rows if reduction.axis else of_columns) for reduction in reductions]
  values = tuple(total.value() if isinstance(total, LogSumExp) else total.total for total in totals)
  return values, (rows, columns, keys, values)


def _backward(matrices, reductions, sweep, residuals, cotangents):
  rows, columns, keys, values = residuals
  dtype = accumulation_dtype(*jax.tree.leaves((rows, columns)))
  sweep = sweep.in_one_tile_if_small(len(jax.tree.leaves(rows)[0]))

  def tile_fn(rows, columns, fresh):
    found, pull = jax.vjp(_varying(matrices), _wide(rows[0], dtype), _wide(columns[0], dtype))
    mask = _mask(found[0].shape, rows[1], columns[1], fresh)
    of_rows, of_columns = iter(rows[2]), iter(columns[2])
    slopes = tuple(
      _slopes(reduction, matrix, mask, *next(of_rows if reduction.axis else of_columns))
      for reduction, matrix in zip(reductions, found, strict=True)
    )
    return tuple(jax.tree.map(Sum, gradients) for gradients in pull(slopes))

  lines = _apart(reductions, list(zip(values, cotangents, strict=True)))
  empty = jax.tree.map(lambda leaf: Sum.empty(leaf.shape, dtype), (rows, columns))
  totals = sweep(tile_fn, (rows, keys[0], lines[0]), (columns, keys[1], lines[1]), empty)
  gradients = (
    jax.tree.map(lambda leaf, total: total.total.astype(leaf.dtype), side, sums)
    for side, sums in zip((rows, columns), totals, strict=True)
  )
  return *gradients, None


_reduced.defvjp(_forward, _backward)


def _varying(matrices: Matrices) -> Matrices:
  """Marks what a matrix does not owe to the tile, such as ones, as what its derivative is."""
  return lambda rows, columns: pairwise.vary(matrices(rows, columns), rows, columns)


def _wide(tree: Any, dtype: jnp.dtype) -> Any:
  """Casts what travelled in few bits, so that the shares of all tiles are summed before any is rounded."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _apart(reductions: tuple[Reduction, ...], parts: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Divides one part for each reduction into those of the rows and those of the columns."""
  both = list(zip(reductions, parts, strict=True))
  return tuple(part for reduction, part in both if reduction.axis), tuple(
    part for reduction, part in both if not reduction.axis
  )


def _mask(shape: tuple[int, int], rows: pairwise.Keys, columns: pairwise.Keys, fresh: Any) -> Bool[Array, "a b"]:
  return only_negatives(jnp.zeros(shape), rows, columns, fresh) == 0


def _reduce(reduction: Reduction, matrix: Float[Array, "a b"], mask: Bool[Array, "a b"]) -> LogSumExp | Sum:
  if reduction.logarithm:
    return LogSumExp.along(reduction.axis, jnp.where(mask, matrix, -jnp.inf))
  return Sum(jnp.sum(jnp.where(mask, matrix, 0), reduction.axis))


def _slopes(
  reduction: Reduction,
  matrix: Float[Array, "a b"],
  mask: Bool[Array, "a b"],
  total: Float[Array, "_"],
  cotangent: Float[Array, "_"],
) -> Float[Array, "a b"]:
  """Derivatives by the entries of a matrix of what its lines' results are multiplied by."""
  slopes = jnp.expand_dims(cotangent, reduction.axis)
  if reduction.logarithm:
    # What is masked may exceed the log-sum-exp.
    exponents = jnp.where(mask & (matrix != -jnp.inf), matrix, 0) - jnp.expand_dims(finite(total), reduction.axis)
    mask = mask & (matrix != -jnp.inf)
    slopes = slopes * jnp.exp(jnp.where(mask, exponents, -jnp.inf))
  return jnp.where(mask, jnp.broadcast_to(slopes, matrix.shape), 0)
