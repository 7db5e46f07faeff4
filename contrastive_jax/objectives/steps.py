"""The number of steps that a term has seen, as part of its state, up to the number at which it stops mattering."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from contrastive_jax.objectives.term import Arrays, Variable


def variables(most: int) -> dict[str, Variable]:
  """Describes the count, which ends at `most`; nothing where that is 0."""
  return {"steps": Variable((), (), lambda _, shape: jnp.zeros(shape, jnp.int32))} if most else {}


def counted(state: Arrays, most: int) -> dict[str, Int[Array, ""]]:
  """Returns the count after one more step; nothing where `most` is 0."""
  return {"steps": jnp.minimum(state["steps"] + 1, most)} if most else {}


def falling(end: float, state: Arrays, most: int) -> Float[Array, ""] | float:
  """Returns a number that falls from 1 to `end` along half a cosine over `most` steps, and stays there."""
  if not most:
    return end
  done = state["steps"].astype(jnp.float32) / most
  return end + (1 - end) * (1 + jnp.cos(jnp.pi * done)) / 2


def rising(end: float, state: Arrays, most: int) -> Float[Array, ""] | float:
  """Returns a number that rises from 0 to `end` along a line over `most` steps, and stays there."""
  return end * state["steps"].astype(jnp.float32) / most if most else end
