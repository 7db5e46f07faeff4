"""A layer, a rectifier and a layer, which some terms put behind the embeddings and which are only needed to train."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.objectives.term import Arrays, Variable

# FSDP splits what is multiplied by the embeddings' features.
INTO, OUT = ("embed", None), (None, "embed")


def variables(dim: int, hidden: int, out: int, number: int) -> Arrays:
  """Describes the parameters.

  Args:
    dim: number of features of the input.
    hidden: number of features between the layers.
    out: number of features of the output.
    number: number of this network among those of a term, each of which is drawn from a key of its own.
  """

  def zeros(length: int, axis: str | None) -> Variable:
    return Variable((length,), (axis,), lambda _, shape: jnp.zeros(shape))

  return {
    "into": Variable((dim, hidden), INTO, _normal(number, 0)),
    "into_bias": zeros(hidden, None),
    "out": Variable((hidden, out), OUT, _normal(number, 1)),
    "out_bias": zeros(out, OUT[1]),
  }


def apply(params: Arrays, rows: Float[Array, "... dim"]) -> Float[Array, "... out"]:
  """Computes the output of rows, of parameters that every device has whole."""
  hidden = jax.nn.relu(_product(rows, params["into"]) + params["into_bias"])
  return _product(hidden, params["out"]) + params["out_bias"]


def _product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.matmul(rows, kernel, precision=lax.Precision.HIGHEST)


def _normal(number: int, layer: int):
  """Returns the maker of a kernel; each is drawn from a key of its own."""

  def create(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 2 * number + layer), shape) / jnp.sqrt(shape[0])

  return create
