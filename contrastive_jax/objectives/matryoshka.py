"""A term that asks the first features of embeddings to be embeddings of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses.negatives import accumulation_dtype
from contrastive_jax.objectives.term import AroundTerm, Arrays, GlobalTerm, Pairs, Sizes, WrapsTerm

# Parts of the embeddings that are compared where the options name none.
_HALVINGS = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka(WrapsTerm):
  """Another term of whole embeddings, plus the same term of their first features, normalised anew, for several sizes.

  A trained model's embeddings may then be cut to any of the sizes, as `eval.py --dims` does.

  Attributes:
    of: the name of the term. Its options are those of `loss_options` under that name.
    dims: sizes of the parts, each below the embeddings' own; empty is a half, a quarter and an eighth of it.
    weights: weight of the term of each part, in the order of `dims`; empty is 1. That of whole embeddings is 1.

  Kusupati et al., "Matryoshka Representation Learning" (arXiv 2205.13147), equation 1.
  """

  of: str = "sigmoid"
  dims: tuple[int, ...] = within(COUNT, ())
  weights: tuple[float, ...] = within(POSITIVE, ())

  separates: ClassVar[bool] = True

  def __post_init__(self):
    if len(set(self.dims)) < len(self.dims):
      raise UserError(f"dims={self.dims} names a size twice: name each once")
    if self.weights and len(self.weights) != len(self.dims):
      raise UserError(f"weights={self.weights} must have a number for each of the {len(self.dims)} sizes in dims")

  def around(self, term: GlobalTerm) -> GlobalTerm:
    return _Nested(options=self, term=term)

  def parts(self, dim: int) -> dict[str, tuple[int, float]]:
    """Returns the size and the weight of each part of embeddings of size `dim`, by its name, and of the whole."""
    chosen = self.dims or tuple(dim // divisor for divisor in _HALVINGS if dim // divisor)
    weights = self.weights or (1.0,) * len(chosen)
    parts = {f"first_{size}": (min(size, dim), weight) for size, weight in zip(chosen, weights, strict=True)}
    return {"whole": (dim, 1.0)} | parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Nested(AroundTerm):
  """A term of whole embeddings and of their parts."""

  options: Matryoshka

  def params(self, sizes: Sizes) -> Arrays:
    return self._each(sizes, self.term.params)

  def state(self, sizes: Sizes) -> Arrays:
    return self._each(sizes, self.term.state)

  def _each(self, sizes: Sizes, of: Callable[[Sizes], Arrays]) -> Arrays:
    """Describes arrays of the term for each size of embeddings, by the part's name, without those that have none."""
    dim = sizes.embed_dim
    if sizes.model is not None and any(size >= dim for size in self.options.dims):
      raise UserError(
        f"loss_options.matryoshka.dims={self.options.dims} must all be below model.embed_dim={dim}, the size of whole"
        " embeddings, which are compared as well"
      )
    found = {
      name: of(dataclasses.replace(sizes, embed_dim=size)) for name, (size, _) in self.options.parts(dim).items()
    }
    return {name: arrays for name, arrays in found.items() if arrays}

  def sample_values(self, state: Arrays) -> dict[str, Float[Array, "rows"]]:
    return self.term.sample_values(state["whole"]) if "whole" in state else {}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    total, after, metrics = 0.0, {}, {}
    for name, (size, weight) in self.options.parts(pairs.image.shape[1]).items():

      def first(embeddings: jax.Array, size: int = size) -> jax.Array:
        return _first(embeddings, size)

      value, remembered, own = self.term(pairs.map(first), params.get(name, {}), state.get(name, {}), **exchange)
      total += weight * value
      after |= {name: remembered} if name in state else {}
      # Those of whole embeddings are what the term reports by itself.
      metrics |= own if name == "whole" else {f"loss_{name}": value}
    return total, after, metrics


def _first(embeddings: jax.Array, size: int) -> jax.Array:
  """Returns the first features of embeddings, normalised anew; zero where they are zero."""
  if size == embeddings.shape[-1]:
    return embeddings
  part = embeddings[..., :size].astype(accumulation_dtype(embeddings))
  square = jnp.sum(jnp.square(part), axis=-1, keepdims=True)
  return (part * jax.lax.rsqrt(jnp.where(square > 0, square, 1))).astype(embeddings.dtype)
