"""The exponentials of a softmax tile: summed along its rows and its columns, and back from those sums to slopes.

A logit's row and column have different maxima, so that each direction takes an exponential of its own. Where all maxima
of a tile lie within `SPREAD` of each other, one exponential relative to the highest serves both. CPUs, where they cost
a tenth of the time, take that path when they can; accelerators gain nothing from it.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses.pairwise import Keys
from contrastive_jax.losses.reductions import LogSumExp, finite

# e^-60, and the 1e-7 of it that a float32 sum can tell apart, are normal float32 numbers.
SPREAD = 60.0


def only_negatives(
  similarities: Float[Array, "a b"], rows: Keys, columns: Keys, fresh: Bool[Array, "a b"] | None
) -> Float[Array, "a b"]:
  """Returns the similarities of a tile, minus infinity where a row and a column are no negatives of each other.

  So the keys are compared once, and what is kept for the backward pass tells the negatives too.

  Args:
    similarities: those of all pairs of the tile.
    rows: keys of the rows.
    columns: keys of the columns. A row and a column that share a key are no negatives of each other, nor is what is not
      there.
    fresh: None, or marks the pairs that no earlier tile has counted.
  """
  conditions = [] if fresh is None else [fresh]
  if rows.present is not None:
    conditions.append(rows.present[:, None])
  if columns.present is not None:
    conditions.append(columns.present[None, :])
  for row_key, column_key in zip(rows.words, columns.words, strict=True):
    differs = (row[:, None] != column[None, :] for row, column in zip(row_key, column_key, strict=True))
    conditions.append(functools.reduce(operator.or_, differs))
  return jnp.where(functools.reduce(operator.and_, conditions), similarities, -jnp.inf)


def with_mask(negatives: Float[Array, "a b"]) -> tuple[Float[Array, "a b"], Bool[Array, "a b"]]:
  """Returns what `only_negatives` returned with 0 where there is no negative, and where there is one.

  NaN counts as a negative, and so reaches the loss.
  """
  mask = negatives != -jnp.inf
  return jnp.where(mask, negatives, 0), mask


Weights = tuple[Float[Array, "a b"], Float[Array, "a b"]] | None


class Lines(NamedTuple):
  """The numbers of each row, or of each column, that the gradient needs.

  Attributes:
    own: similarity of the positive.
    largest: largest similarity of the negatives.
    coefficient: coefficient of each exponential relative to `largest`.
    constant: number that is added to the derivative by each negative's logit, or None.
  """

  own: Float[Array, "lines"]
  largest: Float[Array, "lines"]
  coefficient: Float[Array, "lines"]
  constant: Float[Array, "lines"] | None


def log_sum_exps(
  negatives: Float[Array, "a b"], scale: Float[Array, ""], weights: Weights
) -> tuple[LogSumExp, LogSumExp]:
  """Computes log-sum-exps of the scaled similarities that `only_negatives` returned, along rows and along columns."""

  def apart(negatives, scale, weights=(None, None)):
    return tuple(LogSumExp.along(axis, negatives, scale, weight) for axis, weight in zip((1, 0), weights, strict=True))

  def shared(negatives, scale):
    largest = tuple(jnp.max(negatives, axis) for axis in (1, 0))
    highest = finite(jnp.max(largest[0]))
    references = tuple(jnp.where(jnp.isneginf(line), highest, line) for line in largest)

    def one(negatives):
      similarities, mask = with_mask(negatives)
      exponents = jnp.where(mask, (similarities - highest) * scale, -jnp.inf)
      # The barrier keeps the exponentials from being computed once for each sum.
      terms = lax.optimization_barrier(jnp.exp(exponents))
      return tuple(
        jnp.sum(terms, axis) * jnp.exp((highest - line) * scale) for axis, line in zip((1, 0), references, strict=True)
      )

    def two(negatives):
      return tuple(line.total for line in apart(negatives, scale))

    totals = lax.cond(_are_close(references, scale), one, two, negatives)
    return tuple(
      LogSumExp(line, total, jnp.full_like(line, scale)) for line, total in zip(largest, totals, strict=True)
    )

  if weights is not None:
    return apart(negatives, scale, weights)
  return lax.platform_dependent(negatives, scale, cpu=shared, default=apart)


def slopes(
  negatives: Float[Array, "a b"], scale: Float[Array, ""], rows: Lines, columns: Lines, weights: Weights
) -> tuple[Float[Array, "a b"], Float[Array, "a"]]:
  """Derivatives by the logits of what `only_negatives` returned, and each row's part of the derivative by the scale."""

  def finish(similarities, mask, rows, columns, from_row, from_column):
    """Puts the shares that a logit has in its row and in its column together."""
    if rows.constant is not None:
      from_row, from_column = from_row + rows.constant[:, None], from_column + columns.constant[None, :]
    total = jnp.where(mask, from_row + from_column, 0)
    # Relative to the positive, whose own slope the caller adds: nearly equal similarities keep their digits.
    by_scale = from_row * (similarities - rows.own[:, None]) + from_column * (similarities - columns.own[None, :])
    return total, jnp.sum(jnp.where(mask, by_scale, 0), axis=1)

  def apart(negatives, scale, rows, columns, weights=None):
    similarities, mask = with_mask(negatives)
    exponents = (similarities - rows.largest[:, None]) * scale, (similarities - columns.largest[None, :]) * scale
    # What is no negative, or has a weight of 0, may exceed `largest`. An exponential that overflows would be masked
    # here, but not in derivatives of this, which multiply it by 0.
    counted = (mask, mask) if weights is None else tuple(mask & (w > 0) for w in weights)
    from_row, from_column = (jnp.exp(jnp.where(c, e, 0)) for c, e in zip(counted, exponents, strict=True))
    if weights is not None:
      from_row, from_column = from_row * weights[0], from_column * weights[1]
    from_row, from_column = from_row * rows.coefficient[:, None], from_column * columns.coefficient[None, :]
    return finish(similarities, mask, rows, columns, from_row, from_column)

  def shared(negatives, scale, rows, columns):
    highest = jnp.maximum(jnp.max(rows.largest), jnp.max(columns.largest))

    def one(negatives):
      similarities, mask = with_mask(negatives)
      terms = jnp.exp(jnp.where(mask, (similarities - highest) * scale, 0))
      by_row, by_column = (side.coefficient * jnp.exp((highest - side.largest) * scale) for side in (rows, columns))
      return finish(similarities, mask, rows, columns, terms * by_row[:, None], terms * by_column[None, :])

    def two(negatives):
      return apart(negatives, scale, rows, columns)

    return lax.cond(_are_close((rows.largest, columns.largest), scale), one, two, negatives)

  if weights is not None:
    return apart(negatives, scale, rows, columns, weights)
  return lax.platform_dependent(negatives, scale, rows, columns, cpu=shared, default=apart)


def _are_close(lines: tuple[Float[Array, "a"], Float[Array, "b"]], scale: Float[Array, ""]) -> Bool[Array, ""]:
  first, second = lines
  highest = jnp.maximum(jnp.max(first), jnp.max(second))
  lowest = jnp.minimum(jnp.min(first), jnp.min(second))
  return (highest - lowest) * scale <= SPREAD
