"""What a sweep over the similarity matrix accumulates for each row or column, and how two partial results merge.

An accumulator is a pytree whose leaves have the row (or column) index as leading axis. `merge` is associative and
commutative, so the order of tiles and devices changes nothing but rounding.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def collective(function: Callable[[Array, int], Array], tree: Any) -> Any:
  """Applies a collective to every leaf, once for all vectors of one dtype: a message costs more than its few bytes.

  Args:
    function: of an array and the number of its row (or column) axis.
    tree: pytree of arrays whose leading axis is that axis.
  """
  leaves, structure = jax.tree.flatten(tree)
  vectors: dict[Any, list[int]] = {}
  for place, leaf in enumerate(leaves):
    if leaf.ndim == 1:
      vectors.setdefault(leaf.dtype, []).append(place)
    else:
      leaves[place] = function(leaf, 0)
  for places in vectors.values():
    together = function(jnp.stack([leaves[place] for place in places]), 1)
    for row, place in enumerate(places):
      leaves[place] = together[row]
  return jax.tree.unflatten(structure, leaves)


class Accumulator(abc.ABC):
  """Base of all accumulators."""

  @abc.abstractmethod
  def merge(self, other: "Accumulator") -> "Accumulator":
    """The accumulator of what either has seen."""

  def scatter(self, axes: tuple[str, ...]) -> "Accumulator":
    """Merges the devices' accumulators of all columns; each device keeps those of its own columns."""
    devices = lax.axis_size(axes)

    def exchange(leaf, axis):
      return lax.all_to_all(leaf, axes, split_axis=axis, concat_axis=axis, tiled=True)

    received = collective(exchange, self)
    stack = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), received)
    # Halves merge with halves: a chain over hundreds of devices would take a minute to compile.
    while devices > 1:
      half = devices // 2
      first, second, rest = (
        jax.tree.map(lambda leaf, piece=piece: leaf[piece], stack)
        for piece in (slice(half), slice(half, 2 * half), slice(2 * half, None))
      )
      stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first.merge(second), rest)
      devices -= half
    return jax.tree.map(lambda leaf: leaf[0], stack)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Accumulator):
  """A plain sum; `total` has any trailing shape."""

  total: Float[Array, "..."]

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "Sum":
    return cls(jnp.zeros(shape, dtype))

  def merge(self, other: "Sum") -> "Sum":
    return type(self)(self.total + other.total)

  def scatter(self, axes: tuple[str, ...]) -> "Sum":
    return type(self)(lax.psum_scatter(self.total, axes, scatter_dimension=0, tiled=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogSumExp(Accumulator):
  """Running log-sum-exp of values times a scale.

  Values are subtracted before they are scaled, which keeps the digits of their differences.

  Attributes:
    largest: largest value, minus infinity where there was none.
    total: sum of the exponentials relative to it.
    scale: of each line, at least 0.
  """

  largest: Float[Array, "..."]
  total: Float[Array, "..."]
  scale: Float[Array, "..."]

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype, scale: Float[Array, ""] | float = 1.0) -> "LogSumExp":
    return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.full(shape, scale, dtype))

  @classmethod
  def along(
    cls,
    axis: int,
    values: Float[Array, "a b"],
    mask: Bool[Array, "a b"],
    scale: Float[Array, ""] | float = 1.0,
    weights: Float[Array, "a b"] | None = None,
  ) -> "LogSumExp":
    """Of what `mask` marks in one tile, along `axis`; a weight of 0 leaves out what it belongs to."""
    if weights is not None:
      mask = mask & (weights > 0)
    largest = jnp.max(jnp.where(mask, values, -jnp.inf), axis, keepdims=True)
    # Masked before the exponential, which might overflow: derivatives of the gradient would multiply infinity by 0.
    terms = jnp.exp(jnp.where(mask, (values - finite(largest)) * scale, -jnp.inf))
    terms = terms if weights is None else terms * weights
    largest = jnp.squeeze(largest, axis)
    return cls(largest, jnp.sum(terms, axis), jnp.full_like(largest, scale))

  def merge(self, other: "LogSumExp") -> "LogSumExp":
    largest = jnp.maximum(self.largest, other.largest)

    def relative(part):
      # The total of an empty part is 0, whatever it is multiplied by.
      step = jnp.where(jnp.isneginf(part.largest), 0, finite(part.largest) - finite(largest))
      return part.total * jnp.exp(step * part.scale)

    return type(self)(largest, relative(self) + relative(other), self.scale)

  def value(self) -> Float[Array, "..."]:
    """The log-sum-exp, minus infinity where nothing was accumulated."""
    return safe_log(self.total) + finite(self.largest) * self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(Accumulator):
  """The k largest values, in falling order; minus infinity where fewer were seen. k = 1 is a running maximum."""

  values: Float[Array, "... k"]

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "TopK":
    return cls(jnp.full(shape, -jnp.inf, dtype))

  @classmethod
  def along(cls, axis: int, values: Float[Array, "a b"], k: int) -> "TopK":
    """Of one tile, along `axis`."""
    lines = values if axis == 1 else values.T
    missing = max(0, k - lines.shape[1])
    lines = jnp.pad(lines, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return cls(lax.top_k(lines, k)[0])

  def merge(self, other: "TopK") -> "TopK":
    both = jnp.concatenate([self.values, other.values], axis=-1)
    return type(self)(lax.top_k(both, self.values.shape[-1])[0])


def safe_log(total: Float[Array, "..."]) -> Float[Array, "..."]:
  """The logarithm, minus infinity of 0 with derivatives of 0."""
  some = total > 0
  return jnp.where(some, jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def log_sum_exp(values: Float[Array, "... n"]) -> Float[Array, "..."]:
  """Log-sum-exp over the last axis. Minus infinity counts nothing, and where nothing counts all derivatives are 0."""
  some = ~jnp.isneginf(values)
  largest = finite(lax.stop_gradient(jnp.max(values, axis=-1, initial=-jnp.inf)))
  terms = jnp.where(some, jnp.where(some, values, 0) - largest[..., None], -jnp.inf)
  return safe_log(jnp.sum(jnp.exp(terms), axis=-1)) + largest


def finite(largest: Float[Array, "..."]) -> Float[Array, "..."]:
  """A shift that is safe to subtract: infinity minus infinity would be NaN."""
  return jnp.where(jnp.isneginf(largest), 0, largest)
