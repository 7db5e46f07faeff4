"""Accumulators of a sweep over the similarity matrix, one for each row or column, and how two of them merge.

An accumulator is a pytree whose leaves have the row (or column) index as leading axis. `merge` is associative and
commutative, so the order of tiles and devices changes nothing but rounding.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """A tree of arrays with the row (or column) index as leading axis, all vectors of one dtype in one array.

  To cut a tile out of an array, or to send it, costs more than its few bytes.

  Attributes:
    vectors: an array `[vectors, rows]` for each dtype.
    others: the arrays that are no vectors.
    structure: the structure of the tree.
    places: number of each leaf among `vectors`, row by row and array by array; None for one of `others`.
  """

  vectors: tuple[Array, ...]
  others: tuple[Array, ...]
  structure: Any = dataclasses.field(metadata={"static": True})
  places: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})

  @classmethod
  def of(cls, tree: Any) -> "Packed":
    leaves, structure = jax.tree.flatten(tree)
    by_dtype: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
      if leaf.ndim == 1:
        by_dtype.setdefault(leaf.dtype, []).append(index)
    number = {index: place for place, index in enumerate(itertools.chain(*by_dtype.values()))}
    return cls(
      tuple(jnp.stack([leaves[index] for index in members]) for members in by_dtype.values()),
      tuple(leaf for leaf in leaves if leaf.ndim != 1),
      structure,
      tuple(number.get(index) for index in range(len(leaves))),
    )

  def map(self, function: Callable[[Array, int], Array]) -> "Packed":
    """Applies a function of an array and the number of its row (or column) axis."""
    vectors, others = (
      tuple(function(leaf, axis) for leaf in leaves) for leaves, axis in ((self.vectors, 1), (self.others, 0))
    )
    return dataclasses.replace(self, vectors=vectors, others=others)

  def tree(self) -> Any:
    """Returns the tree that was packed."""
    vectors, others = list(itertools.chain(*self.vectors)), iter(self.others)
    leaves = [next(others) if place is None else vectors[place] for place in self.places]
    return jax.tree.unflatten(self.structure, leaves)


def collective(function: Callable[[Array, int], Array], tree: Any) -> Any:
  """Applies a collective, a function of an array and the number of its row (or column) axis, to a tree."""
  return Packed.of(tree).map(function).tree()


def gathered(tree: Any, axes: tuple[str, ...]) -> Any:
  """Returns arrays of the pairs of all devices, in the order of the pairs."""
  if not axes:
    return tree
  return collective(lambda leaf, axis: lax.all_gather(leaf, axes, axis=axis, tiled=True), tree)


class Accumulator(abc.ABC):
  """Base of all accumulators."""

  @abc.abstractmethod
  def merge(self, other: "Accumulator") -> "Accumulator":
    """Returns the accumulator of everything that either has seen."""

  def cut(self, start: Array, size: int) -> "Accumulator":
    """Returns the part of `size` lines from `start` on."""
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), self)

  def put(self, part: "Accumulator", start: Array) -> "Accumulator":
    """Returns the accumulator with the lines from `start` on replaced by those of a part."""
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, start, 0), self, part)

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
class WholeSum(Accumulator):
  """A sum over all tiles and not over those of a line, among the accumulators of the rows; `total` has any shape."""

  total: Float[Array, "..."]

  def merge(self, other: "WholeSum") -> "WholeSum":
    return type(self)(self.total + other.total)

  def cut(self, start: Array, size: int) -> "WholeSum":
    return self

  def put(self, part: "WholeSum", start: Array) -> "WholeSum":
    return part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogSumExp(Accumulator):
  """Running log-sum-exp of values times a scale.

  Values are subtracted before they are scaled, which keeps the digits of their differences.

  Attributes:
    largest: largest value, minus infinity where there was none.
    total: sum of the exponentials relative to it.
    scale: the scale of each line, at least 0.
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
    scale: Float[Array, ""] | float = 1.0,
    weights: Float[Array, "a b"] | None = None,
  ) -> "LogSumExp":
    """Reduces one tile along `axis`; a value of minus infinity or a weight of 0 leaves out what it belongs to."""
    if weights is not None:
      values = jnp.where(weights > 0, values, -jnp.inf)
    largest = jnp.max(values, axis, keepdims=True)
    # Masked before the exponential, which might overflow: derivatives of the gradient would multiply infinity by 0.
    counted = values != -jnp.inf
    terms = jnp.exp(jnp.where(counted, (jnp.where(counted, values, 0) - finite(largest)) * scale, -jnp.inf))
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
    """Returns the log-sum-exp, minus infinity where nothing was accumulated."""
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
    """Reduces one tile along `axis`."""
    lines = values if axis == 1 else values.T
    missing = max(0, k - lines.shape[1])
    lines = jnp.pad(lines, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return cls(lax.top_k(lines, k)[0])

  def merge(self, other: "TopK") -> "TopK":
    both = jnp.concatenate([self.values, other.values], axis=-1)
    return type(self)(lax.top_k(both, self.values.shape[-1])[0])


def safe_log(total: Float[Array, "..."]) -> Float[Array, "..."]:
  """Computes the logarithm, which is minus infinity at 0, with derivatives of 0 there."""
  some = total > 0
  return jnp.where(some, jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def log_sum_exp(values: Float[Array, "... n"]) -> Float[Array, "..."]:
  """Computes log-sum-exp over the last axis, in which minus infinity counts nothing and has derivatives of 0.

  Examples:
    >>> log_sum_exp(jnp.array([[0.0, 0.0, -jnp.inf], [-jnp.inf] * 3])).round(3).tolist()
    [0.6930000185966492, -inf]
  """
  some = ~jnp.isneginf(values)
  largest = finite(lax.stop_gradient(jnp.max(values, axis=-1, initial=-jnp.inf)))
  terms = jnp.where(some, jnp.where(some, values, 0) - largest[..., None], -jnp.inf)
  return safe_log(jnp.sum(jnp.exp(terms), axis=-1)) + largest


def finite(largest: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns a shift that is safe to subtract: infinity minus infinity would be NaN."""
  return jnp.where(jnp.isneginf(largest), 0, largest)
