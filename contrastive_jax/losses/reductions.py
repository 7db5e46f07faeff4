"""What a sweep over the similarity matrix accumulates for each row or column, and how two partial results merge.

An accumulator is a pytree whose leaves have the row (or column) index as leading axis. `merge` is associative and
commutative, so the order of tiles and devices changes nothing but rounding.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class Accumulator(abc.ABC):
  """Base of all accumulators."""

  @abc.abstractmethod
  def merge(self, other: "Accumulator") -> "Accumulator":
    """The accumulator of what either has seen."""

  def scatter(self, axes: tuple[str, ...]) -> "Accumulator":
    """Merges the devices' accumulators of all columns; each device keeps those of its own columns."""
    devices = lax.axis_size(axes)

    def exchange(leaf):
      parts = leaf.reshape(devices, -1, *leaf.shape[1:])
      return lax.all_to_all(parts, axes, split_axis=0, concat_axis=0, tiled=True)

    received = jax.tree.map(exchange, self)
    merged = jax.tree.map(lambda leaf: leaf[0], received)
    for device in range(1, devices):
      merged = merged.merge(jax.tree.map(lambda leaf, device=device: leaf[device], received))
    return merged


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
  """Running log-sum-exp: the largest logit and the sum of exponentials relative to it. Empty is minus infinity."""

  largest: Float[Array, "..."]
  total: Float[Array, "..."]

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "LogSumExp":
    return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))

  @classmethod
  def along(cls, axis: int, logits: Float[Array, "a b"], weights: Float[Array, "a b"] | None = None) -> "LogSumExp":
    """Of one tile, along `axis`. What is masked has logit minus infinity."""
    largest = jnp.max(logits, axis, keepdims=True)
    terms = jnp.exp(logits - finite(largest))
    if weights is not None:
      terms = terms * weights
    return cls(jnp.squeeze(largest, axis), jnp.sum(terms, axis))

  def merge(self, other: "LogSumExp") -> "LogSumExp":
    largest = jnp.maximum(self.largest, other.largest)
    shift = finite(largest)
    total = self.total * jnp.exp(self.largest - shift) + other.total * jnp.exp(other.largest - shift)
    return type(self)(largest, total)

  def value(self) -> Float[Array, "..."]:
    """The log-sum-exp, minus infinity where nothing was accumulated."""
    return jnp.log(self.total) + finite(self.largest)


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


def finite(largest: Float[Array, "..."]) -> Float[Array, "..."]:
  """A shift that is safe to subtract: infinity minus infinity would be NaN."""
  return jnp.where(jnp.isneginf(largest), 0, largest)


def masked(logits: Float[Array, "a b"], mask: Bool[Array, "a b"]) -> Float[Array, "a b"]:
  """Logits with what is masked at minus infinity: an added constant would leak at a large logit scale."""
  return jnp.where(mask, logits, -jnp.inf)
