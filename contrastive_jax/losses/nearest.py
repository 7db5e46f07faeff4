"""The embeddings of the nearest negatives of each pair, for losses that need more of them than similarities."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.exponentials import only_negatives
from contrastive_jax.losses.reductions import gathered

# Columns of the block in which the nearest negatives are looked for.
_COLUMNS = 512


def nearest_negatives(
  anchors: Float[Array, "pairs dim"],
  others: Float[Array, "pairs dim"],
  keys: pairwise.Keys,
  count: int,
  *,
  tile: int | None,
  axes: tuple[str, ...],
) -> tuple[Float[Array, "pairs count dim"], Bool[Array, "pairs count"]]:
  """Finds the nearest negatives of each anchor among the pairs of all devices, as constants to the gradient.

  Args:
    anchors: embeddings of one side.
    others: embeddings of the other side, which are gathered from all devices.
    keys: keys of this device's pairs; those that share one are masked first.
    count: number of negatives that each anchor gets.
    tile: number of columns of similarities that exist at once; None is 512.
    axes: mesh axes that the pairs are split over.

  Returns:
    Their embeddings, the nearest one last, and which of them there are none of (the first ones).
  """
  anchors, others = lax.stop_gradient((anchors, others))
  everywhere, all_keys = gathered((others, keys), axes)
  size = min(_COLUMNS if tile is None else tile, len(everywhere))

  def step(carry, block):
    # The last block moves back to stay inside, and its first columns were seen before.
    start = jnp.minimum(block * size, len(everywhere) - size)
    columns, column_keys = jax.tree.map(
      lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), (everywhere, all_keys)
    )
    index = start + jnp.arange(size, dtype=jnp.int32)
    similarities = negatives.matmul(anchors, columns, "id,jd->ij")
    fresh = jnp.broadcast_to(index >= block * size, similarities.shape)
    found = only_negatives(similarities, keys, column_keys, fresh)
    values = jnp.concatenate([carry[0], found], axis=1)
    indices = jnp.concatenate([carry[1], jnp.broadcast_to(index, found.shape)], axis=1)
    best, place = lax.top_k(values, count)
    return (best, jnp.take_along_axis(indices, place, axis=1)), None

  dtype = negatives.accumulation_dtype(anchors, others)
  nothing = jnp.full((len(anchors), count), -jnp.inf, dtype), jnp.zeros((len(anchors), count), jnp.int32)
  blocks = jnp.arange(math.ceil(len(everywhere) / size), dtype=jnp.int32)
  (values, indices), _ = lax.scan(step, pairwise.vary(nothing, anchors, keys), blocks)
  return everywhere[indices[:, ::-1]], jnp.isneginf(values[:, ::-1])
