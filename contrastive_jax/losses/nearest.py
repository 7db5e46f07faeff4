"""The embeddings of the nearest negatives of each pair, for losses that need more of them than similarities."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.blocks import map_blocks
from contrastive_jax.losses.exponentials import only_negatives
from contrastive_jax.losses.reductions import gathered

# Columns of the block in which the nearest negatives are looked for.
_COLUMNS = 512
# Anchors whose nearest negatives are held at once.
_ANCHORS = 256


def over_nearest_negatives(
  function: Callable[..., Float[Array, "anchors ..."]],
  anchors: Float[Array, "pairs dim"],
  others: Float[Array, "pairs dim"],
  keys: pairwise.Keys,
  count: int,
  *beside: Any,
  tile: int | None,
  axes: tuple[str, ...],
) -> Float[Array, "pairs ..."]:
  """Applies a function to each anchor and its nearest negatives among the pairs of all devices.

  The negatives are constants to the gradient. Their embeddings exist for some hundred anchors at a time, and are looked
  up again for the gradient.

  Args:
    function: a function of some anchors `[anchors, dim]`, their negatives `[anchors, count, dim]` with the nearest one
      last, which of them there are none of `[anchors, count]`, the first ones, and the same rows of `beside`.
    anchors: embeddings of one side.
    others: embeddings of the other side, which are gathered from all devices.
    keys: keys of this device's pairs; those that share one are masked first.
    count: number of negatives that each anchor gets.
    *beside: further trees of arrays `[pairs, ...]`.
    tile: number of columns of similarities that exist at once; None is 512.
    axes: mesh axes that the pairs are split over.
  """
  everywhere, all_keys = gathered((lax.stop_gradient(others), keys), axes)
  indices, absent = _nearest(lax.stop_gradient(anchors), keys, everywhere, all_keys, count, tile)

  @jax.checkpoint
  def of_block(rows, fresh):
    anchors, indices, absent, beside = rows
    return function(anchors, everywhere[indices], absent, *beside)

  made = map_blocks(of_block, (anchors, indices, absent, beside), _ANCHORS)
  return made.reshape(-1, *made.shape[2:])[: len(anchors)]


def _nearest(
  anchors: Float[Array, "pairs dim"],
  keys: pairwise.Keys,
  everywhere: Float[Array, "everyone dim"],
  all_keys: pairwise.Keys,
  count: int,
  tile: int | None,
) -> tuple[Int[Array, "pairs count"], Bool[Array, "pairs count"]]:
  """Finds which of the global batch are nearest to each anchor, the nearest one last, and which of them are none."""
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

  dtype = negatives.accumulation_dtype(anchors, everywhere)
  nothing = jnp.full((len(anchors), count), -jnp.inf, dtype), jnp.zeros((len(anchors), count), jnp.int32)
  blocks = jnp.arange(math.ceil(len(everywhere) / size), dtype=jnp.int32)
  (values, indices), _ = lax.scan(step, pairwise.vary(nothing, anchors, keys), blocks)
  return indices[:, ::-1], jnp.isneginf(values[:, ::-1])
