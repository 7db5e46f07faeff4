"""Sums over all negative pairs of the mesh, differentiable in the towers, scale and bias.

Two primitives on top of the sweep: the log-sum-exp of each row and column (softmax family) and a sum of any function of
the logit (sigmoid family). Positives are left to the caller: they cost only pairs x dim. The softmax family reads all
logits relative to that of the positive, in the value and in the gradient of the scale: small losses and nearly equal
similarities keep their digits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.batch import AnyArray
from contrastive_jax.losses import exponentials, pairwise
from contrastive_jax.losses.exponentials import Lines, only_negatives, with_mask
from contrastive_jax.losses.reductions import LogSumExp, Sum, finite, safe_log

# `weight(image_side, text_side, logits) -> (weights for rows, weights for columns)`: at least 0, constants to the
# gradient.
Weight = Callable[[Any, Any, Float[Array, "a b"]], tuple[Float[Array, "a b"], Float[Array, "a b"]]]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The options of `pairwise.sweep` that say how the matrix is visited."""

  axes: tuple[str, ...] = ()
  strategy: str = "ring"
  tile: int | None = None
  ring_order: tuple[int, ...] | None = None

  def is_one_tile(self, rows: int) -> bool:
    """Says whether all logits of a device are one tile, which may then be kept for the backward pass."""
    devices = pairwise.device_count(self.axes)
    block = rows, rows * (1 if self.strategy == "ring" else devices)
    return block[1] == rows * devices and pairwise.tile_shape(*block, self.tile) == block

  def in_one_tile_if_small(self, rows: int) -> "Sweep":
    """Returns the sweep with a tile that holds all logits of a device where the library may choose and they are few."""
    whole = dataclasses.replace(self, tile=rows * pairwise.device_count(self.axes))
    small = rows * whole.tile <= pairwise.DIRECT
    return whole if self.tile is None and small and whole.is_one_tile(rows) else self

  def __call__(self, tile_fn: pairwise.TileFn, rows: Any, columns: Any, empty: tuple[Any, Any]) -> tuple[Any, Any]:
    return pairwise.sweep(tile_fn, rows, columns, empty, **dataclasses.asdict(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NegativeStatistics:
  """Statistics of each image's or each text's negatives; a margin is a logit minus that of the positive.

  The log-sum-exp comes in two parts: at a logit scale of 100 their sum would lose two digits that differences need.

  Attributes:
    largest: `[pairs]`, largest margin, minus infinity without negatives; a constant to the gradient.
    excess: `[pairs]`, log-sum-exp of the weighted margins minus `largest`; its gradient is that of the whole
      log-sum-exp.
    total: `[pairs]`, sum of the margins, or None unless asked for.
    count: `[pairs]`, number of negatives, or None unless asked for; not differentiable.
  """

  # Inside a loop, JAX differentiates the function that returns these by their shapes in place of arrays.
  largest: AnyArray
  excess: AnyArray
  total: AnyArray | None = None
  count: AnyArray | None = None

  @property
  def margin(self) -> Float[Array, "pairs"]:
    """The log-sum-exp of the weighted margins."""
    return self.largest + self.excess


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
  """Returns the type in which sums are taken: at least float32, and float64 for float64."""
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def positive_similarities(image: Float[Array, "pairs dim"], text: Float[Array, "pairs dim"]) -> Float[Array, "pairs"]:
  """Computes the diagonal of the similarity matrix."""
  dtype = accumulation_dtype(image, text)
  return jnp.sum(image.astype(dtype) * text.astype(dtype), axis=1)


def similarities_to(
  anchors: Float[Array, "pairs dim"], others: Float[Array, "pairs count dim"]
) -> Float[Array, "pairs count"]:
  """Computes the similarities of each anchor to embeddings of its own."""
  dtype = accumulation_dtype(anchors, others)
  return jnp.einsum("id,ikd->ik", anchors.astype(dtype), others.astype(dtype), precision=lax.Precision.HIGHEST)


def statistics_of_negatives(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  scale: Float[Array, ""],
  positive: Float[Array, "pairs"],
  keys: pairwise.Keys,
  sweep: Sweep,
  *,
  with_totals: bool = False,
  weight: Weight | None = None,
  image_side: Any = None,
  text_side: Any = None,
) -> tuple[NegativeStatistics, NegativeStatistics]:
  """Computes the log-sum-exp over the negatives of every image and of every text, in one sweep.

  Args:
    image: this device's image embeddings.
    text: this device's text embeddings.
    scale: multiplier of the similarities.
    positive: similarities of the pairs themselves.
    keys: pairs that share one are not each other's negatives; all different means all others are.
    sweep: mesh axes, strategy and tile.
    with_totals: whether to return the sum and the number of the negatives, too (label smoothing).
    weight: a function that returns a factor of each negative's exponential, for images and for texts; 0 leaves it out.
    image_side: pytree of arrays per pair that `weight` sees for its rows.
    text_side: pytree of arrays per pair that `weight` sees for its columns.

  Returns:
    Statistics of the images (rows) and of the texts (columns). Four matrix products of size pairs x pairs x dim for
    value and gradient, three where all logits are one tile and are kept.
  """
  args = pairwise.vary((image, text, scale, positive, keys, (image_side, text_side)), image, text, axes=sweep.axes)
  return _statistics(sweep, with_totals, weight, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _statistics(sweep, with_totals, weight, image, text, scale, positive, keys, sides):
  return _statistics_forward(sweep, with_totals, weight, image, text, scale, positive, keys, sides)[0]


def _statistics_forward(sweep, with_totals, weight, image, text, scale, positive, keys, sides):
  dtype = accumulation_dtype(image, text)
  sweep = sweep.in_one_tile_if_small(len(image))
  kept = []

  def tile_fn(rows, columns, fresh):
    negatives = negatives_of(rows, columns, fresh)
    kept.append(negatives)
    similarities, mask = with_mask(negatives)
    weights = weight(rows[2], columns[2], similarities * scale) if weight else None
    parts = exponentials.log_sum_exps(negatives, scale, weights)
    if not with_totals:
      return tuple((part,) for part in parts)
    sums = similarities, mask.astype(dtype)
    return tuple((part, *(Sum(jnp.sum(line, axis)) for line in sums)) for part, axis in zip(parts, (1, 0), strict=True))

  def empty(count):
    line = Sum.empty((count,), dtype)
    return LogSumExp.empty((count,), dtype, scale), *((line, line) if with_totals else ())

  rows, columns = (image, keys, sides[0]), (text, keys, sides[1])
  totals = sweep(tile_fn, rows, columns, (empty(len(image)), empty(len(text))))

  def relative(log_sum_exp, total=None, count=None):
    margin = (finite(log_sum_exp.largest) - positive) * scale
    largest = jnp.where(jnp.isneginf(log_sum_exp.largest), -jnp.inf, margin)
    excess = safe_log(log_sum_exp.total)
    if total is None:
      return NegativeStatistics(largest, excess)
    return NegativeStatistics(largest, excess, (total.total - count.total * positive) * scale, count.total)

  residuals = image, text, scale, positive, keys, sides, totals, kept[0] if sweep.is_one_tile(len(image)) else None
  return tuple(relative(*side) for side in totals), residuals


def _statistics_backward(sweep, with_totals, weight, residuals, cotangents):
  image, text, scale, positive, keys, sides, totals, kept = residuals
  dtype = accumulation_dtype(image, text)
  sweep = sweep.in_one_tile_if_small(len(image))

  def tile_fn(rows, columns, fresh):
    negatives = negatives_of(rows, columns, fresh) if kept is None else kept
    weights = weight(rows[2], columns[2], with_mask(negatives)[0] * scale) if weight else None
    slopes, d_scale = exponentials.slopes(negatives, scale, rows[3], columns[3], weights)
    d_image, d_text = tile_gradients(rows[0], columns[0], slopes, scale)
    return (d_image, Sum(d_scale)), (d_text,)

  def side(embeddings, which):
    statistics, sums = cotangents[which], totals[which][0]
    some = sums.total > 0
    coefficient = jnp.where(some, statistics.excess / jnp.where(some, sums.total, 1), 0)
    return embeddings, keys, sides[which], Lines(positive, finite(sums.largest), coefficient, statistics.total)

  empty = (Sum.empty(image.shape, dtype), Sum.empty((len(image),), dtype)), (Sum.empty(text.shape, dtype),)
  (d_image, d_scale), (d_text,) = sweep(tile_fn, side(image, 0), side(text, 1), empty)
  d_positive = jnp.zeros_like(positive)
  for statistics, (sums, *counts) in zip(cotangents, totals, strict=True):
    d_positive = d_positive - scale * jnp.where(sums.total > 0, statistics.excess, 0)
    if with_totals:
      d_positive = d_positive - scale * statistics.total * counts[1].total
  return cast(d_image, image), cast(d_text, text), cast_scalar(d_scale, scale), d_positive, None, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def sum_over_negatives(
  value_and_slope: Callable[[Float[Array, "a b"]], tuple[Float[Array, "a b"], Float[Array, "a b"]]],
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  scale: Float[Array, ""],
  bias: Float[Array, ""],
  keys: pairwise.Keys,
  sweep: Sweep,
) -> Float[Array, ""]:
  """Sums `value(scale * similarity + bias)` over the negatives of every image.

  Gradients are made in the forward sweep, where the logits are at hand, and scaled in the backward pass; so only a
  common cotangent of all rows can be served, and the result is one scalar: this device's share of the sum.

  Args:
    value_and_slope: elementwise function of the logits and its derivative.
    image: this device's image embeddings.
    text: this device's text embeddings.
    scale: multiplier of the similarities.
    bias: the number added to the logits.
    keys: pairs that share one are not each other's negatives.
    sweep: mesh axes, strategy and tile.

  Returns:
    This device's share of the sum. Three matrix products of size pairs x pairs x dim for value and gradient.
  """
  args = pairwise.vary((image, text, scale, bias, keys), image, text, axes=sweep.axes)
  return _sum(value_and_slope, sweep, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(value_and_slope, sweep, image, text, scale, bias, keys):
  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(negatives_of(rows, columns, fresh))
    value, _ = value_and_slope(similarities * scale + bias)
    return (Sum(jnp.sum(jnp.where(mask, value, 0), 1)),), ()

  empty = (Sum.empty((len(image),), accumulation_dtype(image, text)),)
  (values,), _ = sweep(tile_fn, (image, keys), (text, keys), (empty, ()))
  return jnp.sum(values.total)


def _sum_forward(value_and_slope, sweep, image, text, scale, bias, keys):
  dtype = accumulation_dtype(image, text)

  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(negatives_of(rows, columns, fresh))
    value, slopes = value_and_slope(similarities * scale + bias)
    slopes = jnp.where(mask, slopes, 0)
    d_image, d_text = tile_gradients(rows[0], columns[0], slopes, scale)
    sums = (jnp.where(mask, value, 0), slopes, slopes * similarities)
    return (d_image, Sum(jnp.stack([jnp.sum(part, 1) for part in sums], axis=1))), (d_text,)

  empty = (Sum.empty(image.shape, dtype), Sum.empty((len(image), 3), dtype)), (Sum.empty(text.shape, dtype),)
  (d_image, sums), (d_text,) = sweep(tile_fn, (image, keys), (text, keys), empty)
  value, d_bias, d_scale = jnp.sum(sums.total, axis=0)
  scalars = d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)
  return value, (cast(d_image, image), cast(d_text, text), *scalars)


def _sum_backward(value_and_slope, sweep, gradients, cotangent):
  return *((cotangent * gradient).astype(gradient.dtype) for gradient in gradients), None


_sum.defvjp(_sum_forward, _sum_backward)


def negatives_of(rows: Any, columns: Any, fresh: Any) -> Float[Array, "a b"]:
  """Returns `only_negatives` of a tile; each side is a tuple of embeddings, keys and more."""
  return only_negatives(matmul(rows[0], columns[0], "id,jd->ij"), rows[1], columns[1], fresh)


def matmul(a: Float[Array, "..."], b: Float[Array, "..."], subscripts: str) -> Float[Array, "..."]:
  """Multiplies with sums in float32 or better; accelerators take bfloat16 or TF32 for float32 unless told otherwise."""
  return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=accumulation_dtype(a, b))


def tile_gradients(
  image: Float[Array, "a dim"], text: Float[Array, "b dim"], slopes: Float[Array, "a b"], scale: Float[Array, ""]
) -> tuple[Sum, Sum]:
  """Computes the gradients of one tile's images and texts; `slopes` is the derivative by the logits."""
  # The slopes feed two products: without the barrier XLA may compute their exponentials twice.
  narrow = lax.optimization_barrier(slopes.astype(jnp.result_type(image, text)))
  d_image = matmul(narrow, text, "ij,jd->id")
  d_text = lax.platform_dependent(narrow, image, cpu=_transpose_then_multiply, default=_contract_rows)
  return Sum(d_image * scale), Sum(d_text * scale)


def _contract_rows(slopes, image):
  return matmul(slopes, image, "ij,id->jd")


def _transpose_then_multiply(slopes, image):
  """Does the same on CPUs, a fifth faster: their matrix product is slow where the rows of both sides are contracted."""
  return matmul(lax.optimization_barrier(slopes.T), image, "ji,id->jd")


def cast(gradient: Sum, like: Array) -> Array:
  """Casts a finished gradient to the dtype of what it belongs to."""
  return gradient.total.astype(like.dtype)


def cast_scalar(gradient: Sum, like: Array) -> Array:
  """Does the same for a scalar, whose gradient comes in parts of the rows."""
  return jnp.sum(gradient.total).astype(like.dtype)
