"""The softmax loss over the hardest negatives of each image and of each text."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import Sum, TopK
from contrastive_jax.losses.softmax import weighted_softmax_loss

# Similarities of each line that are remembered to find the last that is kept; beyond these, they are counted.
_REMEMBERED = 128
# Parts into which the counting cuts an interval each time.
_PARTS = 8


def hard_softmax_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  top_k: int | None = None,
  share: float | None = None,
  pair_weights: Float[Array, "pairs"] | None = None,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which each image and each text keeps its nearest negatives only.

  Pairs that share a key are masked before the selection, so that no duplicate is ever a hard negative. Negatives that
  lie within rounding of the last one that is kept are kept as well. The selection is a constant to the gradient.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    top_k: number of negatives that are kept.
    share: share of the other pairs of the global batch that are kept, instead of `top_k`: `ceil(share * (pairs - 1))`,
      masked ones counted.
    pair_weights: how much each pair counts in the mean over pairs, as in `weighted_softmax_loss`.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    As `softmax_loss`. It takes one more product of size pairs x pairs x dim where few are kept. Where many are it
    takes six (of float32), and remembers none of them.

  Raises:
    UserError: as in `softmax_loss`, and unless exactly one of `top_k` and `share` says how many are kept.

  Wang and Liu, "Understanding the Behaviour of Contrastive Loss" (arXiv 2012.09740), section 4.

  Examples:
    >>> text = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> hard, _ = hard_softmax_loss(text, text, logit_scale=1.0, top_k=2)  # Two of similarity 0, not that of -1.
    >>> round(float(hard), 4)
    0.5514
  """
  pairwise.check(strategy, tile)
  if (top_k is None) == (share is None):
    raise UserError(f"top_k={top_k} and share={share}: give one of them, and leave the other at None")
  if top_k is not None and top_k < 1:
    raise UserError(f"top_k={top_k} must be at least 1")
  if share is not None and not 0 < share <= 1:
    raise UserError(f"share={share} must be above 0 and at most 1")
  axes = pairwise.mesh_axes(axis_name)
  others = len(image) * pairwise.device_count(axes) - 1
  # A share of 0.1 of 20 negatives is 2 of them, whatever 0.1 is as a float.
  kept = top_k if share is None else max(1, math.ceil(share * others - 1e-9 * others))
  selection: dict[str, Any] = {}
  if kept < others:
    keys = pairwise.keys_of(group, len(image), axes)
    sweep = negatives.Sweep(axes, strategy, tile, ring_order)
    least = least_similarities(*lax.stop_gradient((image, text)), keys, kept, sweep)
    # The selection is made by logits, as tiles have them.
    image_side, text_side = (lax.stop_gradient(line * logit_scale) for line in least)
    selection = {"negative_weight": _at_least, "image_side": image_side, "text_side": text_side}
  return weighted_softmax_loss(
    image,
    text,
    logit_scale=logit_scale,
    pair_weights=pair_weights,
    group=group,
    axis_name=axis_name,
    strategy=strategy,
    tile=tile,
    ring_order=ring_order,
    **selection,
  )


def _at_least(image_side: Any, text_side: Any, logits: Float[Array, "a b"]) -> tuple[Array, Array]:
  rows, columns = logits >= image_side[:, None], logits >= text_side[None, :]
  return rows.astype(logits.dtype), columns.astype(logits.dtype)


def least_similarities(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  keys: pairwise.Keys,
  kept: int,
  sweep: negatives.Sweep,
) -> tuple[Float[Array, "pairs"], Float[Array, "pairs"]]:
  """Returns a similarity at or just below the last negative that is kept, for each image and each text.

  Args:
    image: this device's image embeddings, without a gradient.
    text: this device's text embeddings, without a gradient.
    keys: pairs that share one are not each other's negatives.
    kept: number of nearest negatives that are kept. Where there are no more, the result is minus infinity.
    sweep: mesh axes, strategy and tile.

  Examples:
    >>> text = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> least, _ = least_similarities(text, text, pairwise.keys_of(None, 4, ()), 2, negatives.Sweep())
    >>> least.round(3).tolist()
    [-0.5, -0.5, -0.5, -0.5]
  """
  dtype = negatives.accumulation_dtype(image, text)
  # The loss makes the similarities again and may round them otherwise.
  rounding = 4 * math.sqrt(image.shape[1]) * float(jnp.finfo(dtype).eps)
  image, text, keys = pairwise.vary((image, text, keys), image, text, axes=sweep.axes)
  if kept > _REMEMBERED:
    return _least_counted((image, keys), (text, keys), kept, sweep, dtype, rounding)

  def tile_fn(rows, columns, fresh):
    found = negatives.negatives_of(rows, columns, fresh)
    return (TopK.along(1, found, kept + 1),), (TopK.along(0, found, kept + 1),)

  empty = (TopK.empty((len(image), kept + 1), dtype),)
  totals = sweep(tile_fn, (image, keys), (text, keys), (empty, empty))
  # Midway between the two the loss finds the same ones.
  return tuple(jnp.mean(total.values[:, -2:], axis=1) - rounding for (total,) in totals)


def _least_counted(
  rows: Any, columns: Any, kept: int, sweep: negatives.Sweep, dtype: jnp.dtype, rounding: float
) -> tuple[Float[Array, "pairs"], Float[Array, "pairs"]]:
  """Finds the similarities by counting those above some thresholds, and again in the interval that this leaves."""
  length = jnp.max(jnp.linalg.norm(jnp.concatenate([rows[0], columns[0]]).astype(dtype), axis=1))
  bound = jnp.square(lax.pmax(length, sweep.axes) if sweep.axes else length) + rounding
  steps = jnp.arange(_PARTS, dtype=dtype) / _PARTS

  def tile_fn(rows, columns, fresh):
    found = negatives.negatives_of(rows, columns, fresh)
    of_rows, of_columns = rows[2][:, None, :] <= found[:, :, None], columns[2][None] <= found[:, :, None]
    return (Sum(jnp.sum(of_rows, axis=1, dtype=dtype)),), (Sum(jnp.sum(of_columns, axis=0, dtype=dtype)),)

  empty = (Sum.empty((len(rows[0]), _PARTS), dtype),)

  def narrowed(_, interval):
    lows, width = interval
    of_rows, of_columns = (low[:, None] + width * steps for low in lows)
    totals = sweep(tile_fn, (*rows, of_rows), (*columns, of_columns), (empty, empty))
    enough = (jnp.sum(total.total >= kept, axis=1) for (total,) in totals)
    # Where fewer than are kept lie above the lowest of all similarities, all are.
    lows = tuple(
      jnp.where(number > 0, low + width * (number - 1) / _PARTS, -jnp.inf)
      for low, number in zip(lows, enough, strict=True)
    )
    return lows, width / _PARTS

  lows = tuple(jnp.broadcast_to(-bound, len(side[0])) for side in (rows, columns))
  lows = pairwise.vary(lows, rows[0], axes=sweep.axes)
  times = math.ceil(math.log(2.5 / rounding, _PARTS))
  lows, _ = lax.fori_loop(0, times, narrowed, (lows, 2 * bound))
  return tuple(low - rounding for low in lows)
