"""Ways to tell the losses which pairs are not each other's negatives, as the benchmarks of the losses compare them."""

import jax
import jax.numpy as jnp
import numpy as np

# Form -> shape of what it says of one pair, and its type. "none" says nothing: only a pair is no negative of itself.
FORMS = {"none": None, "label": ((), jnp.int32), "keys": ((2, 2), jnp.uint32)}


def abstract(form: str, pairs: int, sharding: jax.sharding.Sharding) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the group of all pairs as an argument that is compiled for; none where the form has none."""
  if FORMS[form] is None:
    return ()
  shape, dtype = FORMS[form]
  return (jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=sharding),)


def random(form: str, pairs: int, sharding: jax.sharding.Sharding) -> tuple[jax.Array, ...]:
  """Groups of which every tenth pair shares one with another."""
  of_pairs = np.random.default_rng(1).integers(0, 5 * pairs, pairs)
  words = of_pairs.astype(np.uint32) * np.uint32(2654435761)

  def fill(argument):
    values = words.reshape(pairs, *(1,) * (len(argument.shape) - 1)).astype(argument.dtype)
    return jax.device_put(np.broadcast_to(values, argument.shape), argument.sharding)

  return tuple(map(fill, abstract(form, pairs, sharding)))
