"""The exponentials of a softmax tile: summed along its rows and its columns, and back from those sums to slopes.

A logit's row and column have different maxima, so that each direction takes an exponential of its own. Where all maxima
of a tile lie within `SPREAD` of each other, one exponential relative to the highest serves both. CPUs, where they cost
a tenth of the time, take that path when they can; accelerators gain nothing from it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.losses.reductions import LogSumExp, finite

# e^-60, and the 1e-7 of it that a float32 sum can tell apart, are normal float32 numbers.
SPREAD = 60.0


class Negatives(NamedTuple):
  """Which pairs of a tile are negatives. Two vectors and not a mask: branches would have to store that first.

  Attributes:
    rows: group of each row.
    columns: group of each column.
    fresh: None, or marks the pairs that no earlier tile has counted.
  """

  rows: Int[Array, "a"]
  columns: Int[Array, "b"]
  fresh: Bool[Array, "a b"] | None

  def mask(self) -> Bool[Array, "a b"]:
    different = self.rows[:, None] != self.columns[None, :]
    return different if self.fresh is None else different & self.fresh


Weights = tuple[Float[Array, "a b"], Float[Array, "a b"]] | None


class Lines(NamedTuple):
  """What the gradient needs to know of each row, or of each column.

  Attributes:
    own: similarity of the positive.
    largest: largest similarity of the negatives.
    coefficient: of each exponential relative to `largest`.
    constant: of each negative's logit, or None.
  """

  own: Float[Array, "lines"]
  largest: Float[Array, "lines"]
  coefficient: Float[Array, "lines"]
  constant: Float[Array, "lines"] | None


def log_sum_exps(
  similarities: Float[Array, "a b"], negatives: Negatives, scale: Float[Array, ""], weights: Weights
) -> tuple[LogSumExp, LogSumExp]:
  """Of the scaled similarities of the negatives: along the rows, and along the columns."""

  def apart(similarities, negatives, scale, weights=(None, None)):
    mask, (row_weights, column_weights) = negatives.mask(), weights
    rows = LogSumExp.along(1, similarities, mask, scale, row_weights)
    return rows, LogSumExp.along(0, similarities, mask, scale, column_weights)

  def shared(similarities, negatives, scale):
    largest = tuple(jnp.max(jnp.where(negatives.mask(), similarities, -jnp.inf), axis) for axis in (1, 0))
    highest = finite(jnp.max(largest[0]))
    references = tuple(jnp.where(jnp.isneginf(line), highest, line) for line in largest)

    def one(similarities):
      exponents = jnp.where(negatives.mask(), (similarities - highest) * scale, -jnp.inf)
      # The barrier keeps the exponentials from being computed once for each sum.
      terms = lax.optimization_barrier(jnp.exp(exponents))
      return tuple(
        jnp.sum(terms, axis) * jnp.exp((highest - line) * scale) for axis, line in zip((1, 0), references, strict=True)
      )

    def two(similarities):
      return tuple(line.total for line in apart(similarities, negatives, scale))

    totals = lax.cond(_are_close(references, scale), one, two, similarities)
    return tuple(
      LogSumExp(line, total, jnp.full_like(line, scale)) for line, total in zip(largest, totals, strict=True)
    )

  if weights is not None:
    return apart(similarities, negatives, scale, weights)
  return lax.platform_dependent(similarities, negatives, scale, cpu=shared, default=apart)


def slopes(
  similarities: Float[Array, "a b"],
  negatives: Negatives,
  scale: Float[Array, ""],
  rows: Lines,
  columns: Lines,
  weights: Weights,
) -> tuple[Float[Array, "a b"], Float[Array, "a"]]:
  """Derivatives by the logits, and each row's part of the derivative by the scale."""

  def finish(similarities, mask, rows, columns, from_row, from_column):
    """The shares that a logit has in its row and in its column, put together."""
    if rows.constant is not None:
      from_row, from_column = from_row + rows.constant[:, None], from_column + columns.constant[None, :]
    total = jnp.where(mask, from_row + from_column, 0)
    # Relative to the positive, whose own slope the caller adds: nearly equal similarities keep their digits.
    by_scale = from_row * (similarities - rows.own[:, None]) + from_column * (similarities - columns.own[None, :])
    return total, jnp.sum(jnp.where(mask, by_scale, 0), axis=1)

  def apart(similarities, negatives, scale, rows, columns, weights=None):
    mask = negatives.mask()
    exponents = (similarities - rows.largest[:, None]) * scale, (similarities - columns.largest[None, :]) * scale
    # What is no negative, or has a weight of 0, may exceed `largest`. An exponential that overflows would be masked
    # here, but not in derivatives of this, which multiply it by 0.
    counted = (mask, mask) if weights is None else tuple(mask & (w > 0) for w in weights)
    from_row, from_column = (jnp.exp(jnp.where(c, e, 0)) for c, e in zip(counted, exponents, strict=True))
    if weights is not None:
      from_row, from_column = from_row * weights[0], from_column * weights[1]
    from_row, from_column = from_row * rows.coefficient[:, None], from_column * columns.coefficient[None, :]
    return finish(similarities, mask, rows, columns, from_row, from_column)

  def shared(similarities, negatives, scale, rows, columns):
    highest = jnp.maximum(jnp.max(rows.largest), jnp.max(columns.largest))

    def one(similarities):
      mask = negatives.mask()
      terms = jnp.exp(jnp.where(mask, (similarities - highest) * scale, 0))
      by_row, by_column = (side.coefficient * jnp.exp((highest - side.largest) * scale) for side in (rows, columns))
      return finish(similarities, mask, rows, columns, terms * by_row[:, None], terms * by_column[None, :])

    def two(similarities):
      return apart(similarities, negatives, scale, rows, columns)

    return lax.cond(_are_close((rows.largest, columns.largest), scale), one, two, similarities)

  if weights is not None:
    return apart(similarities, negatives, scale, rows, columns, weights)
  return lax.platform_dependent(similarities, negatives, scale, rows, columns, cpu=shared, default=apart)


def _are_close(lines: tuple[Float[Array, "a"], Float[Array, "b"]], scale: Float[Array, ""]) -> Bool[Array, ""]:
  first, second = lines
  highest = jnp.maximum(jnp.max(first), jnp.max(second))
  lowest = jnp.minimum(jnp.min(first), jnp.min(second))
  return (highest - lowest) * scale <= SPREAD
