"""The softmax loss with further negatives of a queue: embeddings of earlier pairs, split over the devices."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.exponentials import with_mask
from contrastive_jax.losses.reductions import Accumulator, LogSumExp, Sum, finite, log_sum_exp, safe_log


class Queue(NamedTuple):
  """Embeddings of earlier pairs, of which each device holds a part.

  Attributes:
    image: L2-normalised embeddings of the images.
    text: L2-normalised embeddings of the texts.
    keys: the keys of the pairs, as a loss takes them for its `group`.
    valid: which rows hold a pair already.
  """

  image: Float[Array, "rows dim"]
  text: Float[Array, "rows dim"]
  keys: UInt32[Array, "rows keys 2"]
  valid: Bool[Array, "rows"]


def queued_softmax_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  queue: Queue | None,
  *,
  logit_scale: Float[Array, ""] | float,
  group: UInt32[Array, "pairs keys 2"],
  average: tuple[Float[Array, "pairs dim"], Float[Array, "pairs dim"]] | None = None,
  soft_share: Float[Array, ""] | float | None = None,
  target_temperature: float | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which the texts of a queue are negatives of every image, and its images of every text.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    queue: earlier pairs, which are constants to the gradient; None is no queue.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: 64-bit keys of the pairs. Two pairs that share one are not each other's negatives, whether in the batch or in
      the queue: a pair that the queue still holds from an epoch before is none.
    average: embeddings that an average of the towers makes of the images and of the texts, or None. Every image is then
      compared with these of the texts, its own included, and every text with these of the images. They are constants to
      the gradient, and the queue should hold such as well.
    soft_share: share of the targets that the average gives: the softmax of its own similarities over the pair and its
      negatives, in the batch and in the queue. The rest is on the pair. None is 0, and spares its products.
    target_temperature: divisor of the similarities of the average in its softmax; None takes `1 / logit_scale` as a
      constant to the gradient.
    axis_name: mesh axes that the pairs and the queue are split over, None on one device.
    strategy: "gather" holds the texts of all devices, and the whole queue; "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The loss of the global batch, `softmax_loss` where the queue is empty, and `{"loss_image_to_text",
    "loss_text_to_image"}`. It takes four matrix products of size pairs x pairs x dim, six with
    an average, and six of pairs x queue x dim; `soft_share` takes four more of each.

  Raises:
    UserError: for an unknown strategy, a tile below 1, a `soft_share` without an average or a temperature that is not
      above 0.

  He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv 1911.05722), equation 1, in both
  directions, with the batch among the negatives and the targets of the average as in Li et al., "Align before Fuse"
  (ALBEF, arXiv 2107.07651).

  Examples:
    >>> both, keys = jnp.eye(2), jnp.arange(4, dtype=jnp.uint32).reshape(2, 1, 2)
    >>> later = Queue(both, both, keys + 9, jnp.array([True, False]))
    >>> [
    ...   round(float(queued_softmax_loss(both, both, queue, logit_scale=1.0, group=keys)[0]), 3)
    ...   for queue in (later._replace(valid=jnp.zeros(2, bool)), later, later._replace(keys=keys))
    ... ]
    [0.313, 0.707, 0.432]
  """
  pairwise.check(strategy, tile)
  if soft_share is not None and average is None:
    raise UserError(f"soft_share={soft_share} is a share of the average's targets, and there is no average: give both")
  if target_temperature is not None and not target_temperature > 0:
    raise UserError(f"target_temperature={target_temperature} must be above 0")
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  keys = pairwise.keys_of(group, len(image), axes)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  if average is None:
    positives = (negatives.positive_similarities(image, text),) * 2
    statistics = negatives.statistics_of_negatives(image, text, scale, positives[0], keys, sweep)
    within = [side.margin for side in statistics]
  else:
    slow_image, slow_text = (lax.stop_gradient(side).astype(image.dtype) for side in average)
    own = negatives.positive_similarities(slow_image, slow_text)
    sides = (image, slow_text), (text, slow_image)
    positives = [negatives.positive_similarities(*side) for side in sides]
    within = [
      _margins(*side, scale, positive, keys, keys, sweep) for side, positive in zip(sides, positives, strict=True)
    ]
  queued = []
  if queue is not None:
    queued = [(queue.image, queue.text, pairwise.keys_of(queue.keys, len(queue.keys), axes, queue.valid))]
  pairs = len(image) * pairwise.device_count(axes)
  metrics = {}
  # Each direction has its rows, and the place of the other side among the embeddings of a block.
  directions = {"image_to_text": (image, 1), "text_to_image": (text, 0)}
  for (direction, (rows, other)), positive, margin in zip(directions.items(), positives, within, strict=True):
    further = [
      _margins(rows, block[other].astype(rows.dtype), scale, positive, keys, block[2], sweep) for block in queued
    ]
    loss = jnp.logaddexp(0, log_sum_exp(jnp.stack([margin, *further], axis=1)))
    if soft_share is not None:
      target_scale = lax.stop_gradient(scale) if target_temperature is None else 1 / target_temperature
      blocks = [(block[other], block[2]) for block in ((slow_image, slow_text, keys), *queued)]
      rest, mean = _targets((slow_image, slow_text)[1 - other], blocks, own, target_scale, keys, sweep)
      # A logit is linear in its column, so that the mean of the columns by their targets stands for all of them.
      loss = loss - soft_share * scale * (negatives.positive_similarities(rows, mean) - rest * positive)
    metrics[f"loss_{direction}"] = pairwise.global_sum(jnp.sum(loss), axes) / pairs
  return (metrics["loss_image_to_text"] + metrics["loss_text_to_image"]) / 2, metrics


def _margins(rows, columns, scale, positive, keys, column_keys, sweep) -> Float[Array, "pairs"]:
  """Computes the log-sum-exp over the columns of each row, relative to its positive logit."""
  constants = lax.stop_gradient(columns), keys, column_keys
  args = pairwise.vary((rows, scale, positive, *constants), rows, columns, axes=sweep.axes)
  return _log_sum_exps(sweep, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exps(sweep, rows, scale, positive, columns, keys, column_keys):
  return _log_sum_exps_forward(sweep, rows, scale, positive, columns, keys, column_keys)[0]


def _log_sum_exps_forward(sweep, rows, scale, positive, columns, keys, column_keys):
  dtype = negatives.accumulation_dtype(rows)

  def tile_fn(rows, columns, fresh):
    return (LogSumExp.along(1, negatives.negatives_of(rows, columns, fresh), scale),), ()

  empty = LogSumExp.empty((len(rows),), dtype, scale)
  (sums,), _ = sweep(tile_fn, (rows, keys), (columns, column_keys), ((empty,), ()))
  margin = safe_log(sums.total) + (finite(sums.largest) - positive) * scale
  return margin, (rows, scale, positive, columns, keys, column_keys, sums)


def _log_sum_exps_backward(sweep, residuals, cotangent):
  rows, scale, positive, columns, keys, column_keys, sums = residuals
  dtype = negatives.accumulation_dtype(rows)
  some = sums.total > 0
  coefficient = jnp.where(some, cotangent / jnp.where(some, sums.total, 1), 0)

  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(negatives.negatives_of(rows, columns, fresh))
    own, largest, coefficient = rows[2:]
    slopes = jnp.where(mask, jnp.exp(jnp.where(mask, (similarities - largest[:, None]) * scale, 0)), 0)
    slopes = slopes * coefficient[:, None]
    narrow = lax.optimization_barrier(slopes.astype(rows[0].dtype))
    by_scale = jnp.sum(slopes * (similarities - own[:, None]), axis=1)
    return (Sum(negatives.matmul(narrow, columns[0], "ij,jd->id") * scale), Sum(by_scale)), ()

  lines = rows, keys, positive, finite(sums.largest), coefficient
  empty = Sum.empty(rows.shape, dtype), Sum.empty((len(rows),), dtype)
  (d_rows, d_scale), _ = sweep(tile_fn, lines, (columns, column_keys), (empty, ()))
  d_positive = -scale * jnp.where(some, cotangent, 0)
  return negatives.cast(d_rows, rows), negatives.cast_scalar(d_scale, scale), d_positive, *(None,) * 3


_log_sum_exps.defvjp(_log_sum_exps_forward, _log_sum_exps_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weighted(Accumulator):
  """The log-sum-exp over the columns of each row, and the sum of the columns by the same exponentials.

  Attributes:
    sums: the log-sum-exp.
    columns: the sum of exponential times column, `[rows, dim]`, relative to the largest value of the row as well.
  """

  sums: LogSumExp
  columns: Float[Array, "rows dim"]

  def merge(self, other: "_Weighted") -> "_Weighted":
    sums = self.sums.merge(other.sums)

    def relative(part):
      step = jnp.where(jnp.isneginf(part.sums.largest), 0, finite(part.sums.largest) - finite(sums.largest))
      return part.columns * jnp.exp(step * part.sums.scale)[:, None]

    return type(self)(sums, relative(self) + relative(other))


def _targets(slow, blocks, own, scale, keys, sweep) -> tuple[Float[Array, "pairs"], Float[Array, "pairs dim"]]:
  """Computes the softmax of each row over its pair and its negatives in all blocks, as a constant to the gradient.

  Args:
    slow: embeddings that the average makes of the rows.
    blocks: (embeddings of the other side, their keys), of the batch and of the queue.
    own: similarities of the pairs themselves.
    scale: multiplier of the similarities.
    keys: keys of the rows.
    sweep: mesh axes, strategy and tile.

  Returns:
    The share that is not on the pair itself, and the sum of the negatives by their shares.
  """
  dtype = negatives.accumulation_dtype(slow)
  scale = pairwise.vary(jnp.asarray(scale, dtype), slow, axes=sweep.axes)

  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(negatives.negatives_of(rows, columns, fresh))
    largest = jnp.max(jnp.where(mask, similarities, -jnp.inf), axis=1)
    terms = jnp.where(mask, jnp.exp(jnp.where(mask, (similarities - finite(largest)[:, None]) * scale, 0)), 0)
    sums = LogSumExp(largest, jnp.sum(terms, axis=1), jnp.full_like(largest, scale))
    # The exponentials feed a sum and a product: without the barrier XLA may compute them twice.
    narrow = lax.optimization_barrier(terms.astype(columns[0].dtype))
    return (_Weighted(sums, negatives.matmul(narrow, columns[0], "ij,jd->id")),), ()

  found = _Weighted(LogSumExp.empty((len(slow),), dtype, scale), jnp.zeros(slow.shape, dtype))
  for columns, column_keys in blocks:
    block = pairwise.vary((lax.stop_gradient(columns).astype(slow.dtype), column_keys), slow, axes=sweep.axes)
    (found,), _ = sweep(tile_fn, (slow, keys), block, ((found,), ()))
  # The pair itself may be the farthest of all, or the nearest.
  whole = found.sums.merge(LogSumExp(own, jnp.ones_like(own), jnp.full_like(own, scale)))
  some = ~jnp.isneginf(found.sums.largest)
  factor = jnp.where(some, jnp.exp((finite(found.sums.largest) - whole.largest) * scale), 0) / whole.total
  return found.sums.total * factor, found.columns * factor[:, None]
