"""A function of rows, applied to some of them at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool


def map_blocks(function: Callable[[Any, Bool[jax.Array, "size"]], Any], rows: Any, size: int) -> Any:
  """Applies a function to blocks of rows, one after the other, and stacks what it makes of them.

  Args:
    function: a function of the rows of a block, and of which of them are new: rows come again until the last block is
      full. Where all rows fit into one block it gets them as they are.
    rows: a tree of arrays `[rows, ...]`.
    size: number of rows of a block.

  Examples:
    >>> map_blocks(lambda rows, fresh: jnp.sum(rows * fresh), jnp.arange(5), 3).tolist()
    [3, 7]
  """
  count = len(jax.tree.leaves(rows)[0])
  blocks = math.ceil(count / size)
  if blocks == 1:
    return jax.tree.map(lambda made: made[None], function(rows, jnp.ones(count, bool)))

  def blocked(leaf: jax.Array) -> jax.Array:
    leaf = jnp.concatenate([leaf, leaf[: blocks * size - count]])
    return leaf.reshape(blocks, size, *leaf.shape[1:])

  fresh = (jnp.arange(blocks * size) < count).reshape(blocks, size)
  return lax.map(lambda block: function(*block), (jax.tree.map(blocked, rows), fresh))
