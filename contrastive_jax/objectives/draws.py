"""Random draws of a term, the same on every mesh: they follow from the keys of the pairs of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.losses import pairwise
from contrastive_jax.objectives.term import Pairs


def batch_key(pairs: Pairs, axes: tuple[str, ...]) -> jax.Array:
  """Returns a random key that depends on which pairs are in the global batch, and on nothing else.

  The keys of pairs are hashes, so that their sums are different numbers for other batches. A run that shows the same
  pairs together again draws the same again.

  Args:
    pairs: the local shard inside `jax.shard_map`, or all pairs outside.
    axes: mesh axes that the pairs are split over.
  """
  words = pairwise.global_sum(jnp.sum(pairs.keys, axis=0, dtype=jnp.uint32).reshape(-1), axes)
  key = jax.random.key(0)
  for word in words:
    key = jax.random.fold_in(key, word)
  return key


def of_pairs(draw: Callable[[int], Any], pairs: Pairs, axes: tuple[str, ...]) -> Any:
  """Returns this device's part of arrays that are drawn for all pairs of the batch.

  Args:
    draw: a function from the number of pairs to arrays with that leading axis.
    pairs: the local shard inside `jax.shard_map`, or all pairs outside.
    axes: mesh axes that the pairs are split over.
  """
  count = len(pairs.image)
  drawn = draw(count * pairwise.device_count(axes))
  first = pairwise.pair_index(count, axes)[0]
  return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count), drawn)
