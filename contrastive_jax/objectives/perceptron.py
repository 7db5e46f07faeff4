"""Perceptrons that a term puts behind the towers: they are learned with them, and are no part of the model."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.objectives.term import Arrays, Variable
from contrastive_jax.parallel import placement

# FSDP splits what is multiplied by the features that come in.
_AXES = ("embed", None)


def variables(widths: Sequence[int], *, number: int = 0, normed: bool = False) -> dict[str, Any]:
  """Describes the layers of a perceptron.

  Args:
    widths: number of features that come in, that each hidden layer has, and that go out.
    number: number of the perceptron among those of its term, each of which begins with other kernels.
    normed: whether hidden features are standardised, and then have a scale beside their bias.
  """
  layers = {}
  for place, (into, out) in enumerate(itertools.pairwise(widths)):
    layer = {"kernel": Variable((into, out), _AXES, _normal(number, place)), "bias": _constant(out, 0.0)}
    hidden = place < len(widths) - 2
    layers[f"layer{place + 1}"] = layer | ({"scale": _constant(out, 1.0)} if hidden and normed else {})
  return layers


def apply(
  params: Arrays, features: Float[Array, "... into"], standardized: Callable[[jax.Array], jax.Array] | None = None
) -> Float[Array, "... out"]:
  """Runs a perceptron, with a rectifier after each hidden layer.

  Args:
    params: the arrays that `variables` describes.
    features: what comes in.
    standardized: a function that standardises hidden features, for layers that have a scale.
  """
  for place in range(1, len(params) + 1):
    layer = params[f"layer{place}"]
    features = jnp.matmul(features, layer["kernel"], precision=lax.Precision.HIGHEST)
    if "scale" in layer:
      features = standardized(features) * layer["scale"]
    features = features + layer["bias"]
    features = jax.nn.relu(features) if place < len(params) else features
  return features


def gathered(params: Arrays) -> dict[str, Any]:
  """Returns the layers with their kernels gathered, for terms that are called outside `jax.shard_map`."""
  return {name: {**layer, "kernel": placement.gathered(layer["kernel"], _AXES)} for name, layer in params.items()}


def _normal(number: int, place: int) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
  """Returns the maker of a kernel; each is drawn from a key of its own."""

  def create(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    own = jax.random.fold_in(jax.random.fold_in(key, number), place)
    return jax.random.normal(own, shape) / jnp.sqrt(shape[0])

  return create


def _constant(length: int, value: float) -> Variable:
  return Variable((length,), (None,), lambda _, shape: jnp.full(shape, value, jnp.float32))
