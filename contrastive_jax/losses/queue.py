"""The softmax loss with further negatives of a queue: embeddings of earlier pairs, split over the devices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.exponentials import only_negatives, with_mask
from contrastive_jax.losses.reductions import LogSumExp, Sum, finite, log_sum_exp, safe_log


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
  queue: Queue,
  *,
  logit_scale: Float[Array, ""] | float,
  group: UInt32[Array, "pairs keys 2"],
  average: tuple[Float[Array, "pairs dim"], Float[Array, "pairs dim"]] | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which the texts of a queue are negatives of every image, and its images of every text.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    queue: earlier pairs, which are constants to the gradient.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: 64-bit keys of the pairs. Two pairs that share one are not each other's negatives, whether in the batch or in
      the queue: a pair that the queue still holds from an epoch before is none.
    average: embeddings that an average of the towers makes of the images and of the texts, or None. Every image is then
      compared with these of the texts, its own included, and every text with these of the images. They are constants to
      the gradient, and the queue should hold such as well.
    axis_name: mesh axes that the pairs and the queue are split over, None on one device.
    strategy: "gather" holds the texts of all devices, and the whole queue; "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The loss of the global batch, `softmax_loss` where the queue is empty, and `{"loss_image_to_text",
    "loss_text_to_image"}`. It takes four matrix products of size pairs x pairs x dim, six with
    an average, and six of pairs x queue x dim.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv 1911.05722), equation 1, in both
  directions, with the batch among the negatives as in ALBEF (arXiv 2107.07651).

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
    sides, everywhere = ((image, slow_text), (text, slow_image)), jnp.ones(len(image), bool)
    positives = [negatives.positive_similarities(*side) for side in sides]
    within = [
      _margins(*side, scale, positive, keys, keys, everywhere, sweep)
      for side, positive in zip(sides, positives, strict=True)
    ]
  queue_keys = pairwise.keys_of(queue.keys, len(queue.keys), axes)
  pairs = len(image) * pairwise.device_count(axes)
  metrics = {}
  directions = {"image_to_text": (image, queue.text), "text_to_image": (text, queue.image)}
  for (direction, (rows, columns)), positive, margin in zip(directions.items(), positives, within, strict=True):
    further = _margins(rows, columns.astype(rows.dtype), scale, positive, keys, queue_keys, queue.valid, sweep)
    loss = jnp.logaddexp(0, log_sum_exp(jnp.stack([margin, further], axis=1)))
    metrics[f"loss_{direction}"] = pairwise.global_sum(jnp.sum(loss), axes) / pairs
  return (metrics["loss_image_to_text"] + metrics["loss_text_to_image"]) / 2, metrics


def _margins(rows, columns, scale, positive, keys, column_keys, valid, sweep) -> Float[Array, "pairs"]:
  """Computes the log-sum-exp over the columns of each row, relative to its positive logit."""
  # A bool cannot be summed or sent everywhere: it travels as a number among the keys' words.
  constants = lax.stop_gradient(columns), keys, column_keys, valid.astype(jnp.int32)
  args = pairwise.vary((rows, scale, positive, *constants), rows, columns, axes=sweep.axes)
  return _log_sum_exps(sweep, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exps(sweep, rows, scale, positive, columns, keys, column_keys, valid):
  return _log_sum_exps_forward(sweep, rows, scale, positive, columns, keys, column_keys, valid)[0]


def _log_sum_exps_forward(sweep, rows, scale, positive, columns, keys, column_keys, valid):
  dtype = negatives.accumulation_dtype(rows)

  def tile_fn(rows, columns, fresh):
    return (LogSumExp.along(1, _tile(rows, columns, fresh), scale),), ()

  empty = LogSumExp.empty((len(rows),), dtype, scale)
  (sums,), _ = sweep(tile_fn, (rows, keys), (columns, column_keys, valid), ((empty,), ()))
  margin = safe_log(sums.total) + (finite(sums.largest) - positive) * scale
  return margin, (rows, scale, positive, columns, keys, column_keys, valid, sums)


def _log_sum_exps_backward(sweep, residuals, cotangent):
  rows, scale, positive, columns, keys, column_keys, valid, sums = residuals
  dtype = negatives.accumulation_dtype(rows)
  some = sums.total > 0
  coefficient = jnp.where(some, cotangent / jnp.where(some, sums.total, 1), 0)

  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(_tile(rows, columns, fresh))
    own, largest, coefficient = rows[2:]
    slopes = jnp.where(mask, jnp.exp(jnp.where(mask, (similarities - largest[:, None]) * scale, 0)), 0)
    slopes = slopes * coefficient[:, None]
    narrow = lax.optimization_barrier(slopes.astype(rows[0].dtype))
    by_scale = jnp.sum(slopes * (similarities - own[:, None]), axis=1)
    return (Sum(negatives.matmul(narrow, columns[0], "ij,jd->id") * scale), Sum(by_scale)), ()

  lines = rows, keys, positive, finite(sums.largest), coefficient
  empty = Sum.empty(rows.shape, dtype), Sum.empty((len(rows),), dtype)
  (d_rows, d_scale), _ = sweep(tile_fn, lines, (columns, column_keys, valid), (empty, ()))
  d_positive = -scale * jnp.where(some, cotangent, 0)
  return negatives.cast(d_rows, rows), negatives.cast_scalar(d_scale, scale), d_positive, *(None,) * 4


_log_sum_exps.defvjp(_log_sum_exps_forward, _log_sum_exps_backward)


def _tile(rows, columns, fresh) -> Float[Array, "a b"]:
  """Returns the similarities of a tile, minus infinity where a column holds nothing or is no negative of the row."""
  similarities = negatives.matmul(rows[0], columns[0], "id,jd->ij")
  similarities = jnp.where(columns[2][None, :] > 0, similarities, -jnp.inf)
  return only_negatives(similarities, rows[1], columns[1], fresh)
