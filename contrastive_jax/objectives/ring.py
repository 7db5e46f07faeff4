"""A ring of the newest pairs, split over the devices: a step's pairs take the place of the oldest.

What it holds does not depend on the mesh: a pair's place follows from how many came before it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.objectives import samples
from contrastive_jax.objectives.term import SAMPLES, Arrays, Sizes, Variable


def variables(size: int, sizes: Sizes, option: str) -> dict[str, Variable]:
  """Describes an empty ring: embeddings, keys, the next place, and how many places are taken.

  Args:
    size: number of pairs that it holds.
    sizes: the sizes of the run.
    option: name of the option that says how many pairs it holds, for the error.

  Raises:
    UserError: if a batch brings more pairs.
  """
  if size < sizes.pairs:
    raise UserError(f"{option}={size} is less than the {sizes.pairs} pairs of a batch, which all go into it: raise it")

  def zeros(*shape: int, dtype=jnp.float32) -> Variable:
    axes = (SAMPLES, *(None,) * (len(shape) - 1)) if shape else ()
    return Variable(shape, axes, lambda _, shape: jnp.zeros(shape, dtype))

  return {
    "image": zeros(size, sizes.embed_dim),
    "text": zeros(size, sizes.embed_dim),
    "keys": zeros(size, 2, 2, dtype=jnp.uint32),
    "next": zeros(dtype=jnp.int32),
    "taken": zeros(dtype=jnp.int32),
  }


def valid(ring: Arrays, axes: tuple[str, ...]) -> Bool[Array, "rows"]:
  """Says which of this device's rows hold a pair."""
  return pairwise.pair_index(len(ring["image"]), axes) < ring["taken"]


def push(ring: Arrays, image: Any, text: Any, keys: Any, axes: tuple[str, ...]) -> dict[str, Any]:
  """Returns the ring with the pairs of a step in it, which are at most as many as it holds.

  Args:
    ring: the ring, whose arrays are the local shards inside `jax.shard_map`.
    image: embeddings of this device's images.
    text: embeddings of its texts.
    keys: keys of its pairs.
    axes: mesh axes that pairs and rows are split over; empty on one device.
  """
  devices = pairwise.device_count(axes)
  size, pairs = len(ring["image"]) * devices, len(image) * devices
  rows = (ring["next"] + pairwise.pair_index(len(image), axes)) % size
  stored = {name: ring[name] for name in ("image", "text", "keys")}
  new = jax.lax.stop_gradient({"image": image, "text": text, "keys": keys})
  written = samples.write(stored, rows, new, axes)
  return {**written, "next": (ring["next"] + pairs) % size, "taken": jnp.minimum(ring["taken"] + pairs, size)}
