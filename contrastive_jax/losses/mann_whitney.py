"""The Mann-Whitney (MW) loss: every positive is compared with every negative of the batch, which bounds the AUC."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.exponentials import with_mask
from contrastive_jax.losses.reductions import Sum, WholeSum

# Rows and columns of a tile, and comparisons that exist at once.
_TILE, _COMPARISONS = 128, 2**21


def mann_whitney_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the mean of `log(1 + e^(s_kl - s_ii))` over all positives i and all negatives (k, l).

  A softmax compares a positive with the negatives of its own row and column. This loss also asks that similarities of
  different images mean the same, so that one threshold separates all positives from all negatives.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      the negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None is 128.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch, 0 without negatives, and no metrics. It takes pairs^3 comparisons, each of an
    exponential and a logarithm, in blocks of two million: from some thousand pairs on they outweigh the towers. For two
    pairs it equals `softmax_loss`.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  The mean in place of the sum of equation 3 of arXiv 2510.00137. One minus the area under the ROC curve is at most the
  loss divided by log 2.

  Examples:
    >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> round(float(mann_whitney_loss(image, text, logit_scale=1.0)[0]), 4)
    0.4489
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  positive = negatives.positive_similarities(image, text)
  pairs = len(image) * pairwise.device_count(axes)
  if axes:
    positive = lax.all_gather(positive, axes, tiled=True)
  keys = pairwise.keys_of(group, len(image), axes)
  sweep = negatives.Sweep(axes, strategy, _TILE if tile is None else tile, ring_order)
  args = pairwise.vary((image, text, scale, positive, keys), image, text, axes=axes)
  total, count = _compare(sweep, *args)
  total, count = (pairwise.global_sum(part, axes) for part in (total, lax.stop_gradient(count)))
  return total / (pairs * jnp.maximum(count, 1)), {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compare(sweep, image, text, scale, positive, keys):
  """Returns this device's sum over comparisons and its number of negatives."""
  return _compare_forward(sweep, image, text, scale, positive, keys)[0]


def _compare_forward(sweep, image, text, scale, positive, keys):
  dtype = negatives.accumulation_dtype(image, text)

  def tile_fn(rows, columns, fresh):
    similarities, mask = with_mask(negatives.negatives_of(rows, columns, fresh))
    values, slopes, by_scale, by_positive = _against_all(similarities, mask, positive, scale)
    d_image, d_text = negatives.tile_gradients(rows[0], columns[0], slopes, scale)
    sums = jnp.stack([values, by_scale, jnp.sum(mask.astype(dtype), axis=1)], axis=1)
    return (d_image, Sum(sums), WholeSum(by_positive)), (d_text,)

  empty = Sum.empty(image.shape, dtype), Sum.empty((len(image), 3), dtype), WholeSum(jnp.zeros_like(positive))
  totals = sweep(tile_fn, (image, keys), (text, keys), (empty, (Sum.empty(text.shape, dtype),)))
  (d_image, sums, by_positive), (d_text,) = totals
  value, d_scale, count = jnp.sum(sums.total, axis=0)
  gradients = negatives.cast(d_image, image), negatives.cast(d_text, text), d_scale, -scale * by_positive.total
  return (value, count), gradients


def _compare_backward(sweep, gradients, cotangents):
  cotangent, _ = cotangents
  return *((cotangent * gradient).astype(gradient.dtype) for gradient in gradients), None


_compare.defvjp(_compare_forward, _compare_backward)


def _against_all(similarities, mask, positive, scale):
  """Compares the negatives of a tile with all positives, some of these at a time.

  Returns:
    Of each row the sum of its comparisons; of each negative the sum of their derivatives; of each row the derivative of
    its sum by the scale; of each positive the sum of the derivatives.
  """
  count = len(positive)
  size = min(count, max(1, _COMPARISONS // similarities.size))
  chunks = math.ceil(count / size)
  padded = jnp.pad(positive, (0, chunks * size - count)).reshape(chunks, size)
  there = (jnp.arange(chunks * size) < count).reshape(chunks, size)

  def step(carry, chunk):
    values, slopes, by_scale = carry
    positive, there = chunk
    differences = similarities[:, :, None] - positive
    counted = mask[:, :, None] & there
    logits = differences * scale
    # Both from one exponential that cannot overflow.
    small = jnp.exp(-jnp.abs(logits))
    value = jnp.where(counted, jnp.maximum(logits, 0) + jnp.log1p(small), 0)
    slope = jnp.where(counted, jnp.where(logits >= 0, 1, small) / (1 + small), 0)
    carry = values + jnp.sum(value, (1, 2)), slopes + jnp.sum(slope, 2), by_scale + jnp.sum(slope * differences, (1, 2))
    return carry, jnp.sum(slope, (0, 1))

  line = jnp.zeros_like(similarities[:, 0])
  nothing = pairwise.vary((line, jnp.zeros_like(similarities), line), similarities)
  (values, slopes, by_scale), by_positive = lax.scan(step, nothing, (padded, there))
  return values, slopes, by_scale, by_positive.reshape(-1)[:count]
