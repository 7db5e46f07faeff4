"""Terms that compare what heads make of the embeddings, while the model is used without the heads."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from contrastive_jax.bounds import COUNT, Range, within
from contrastive_jax.models.layers import l2_normalize
from contrastive_jax.objectives import perceptron
from contrastive_jax.objectives.term import AroundTerm, Arrays, GlobalTerm, Pairs, Sizes, WrapsTerm


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHead(WrapsTerm):
  """Another term of what several learned heads make of the embeddings, in a sum over the heads.

  A head is a layer, a rectifier and a layer that all towers share, and its output is normalised. Heads are only needed
  to train and are no part of the model. An image and its text may agree behind all heads and still differ in front of
  them, where the model is used: it stands beside a term of the embeddings themselves.

  Attributes:
    of: the name of the term. Its options are those of `loss_options` under that name.
    heads: number of heads.
    hidden: number of features between the layers of a head.
    dim: number of features that a head makes.

  The heads of AMCL (arXiv 2310.05615), without its temperatures that are learned for every two embeddings.
  """

  of: str = "softmax"
  heads: int = within(Range(1, 64), 3)
  hidden: int = within(COUNT, 512)
  dim: int = within(COUNT, 128)

  separates: ClassVar[bool] = True

  def around(self, term: GlobalTerm) -> GlobalTerm:
    return _BehindHeads(options=self, term=term)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BehindHeads(AroundTerm):
  """A term of what each head makes of the embeddings."""

  options: MultiHead

  def unlearned(self, pairs: int) -> float | None:
    of_one = self.term.unlearned(pairs)
    return None if of_one is None else self.options.heads * of_one

  def params(self, sizes: Sizes) -> Arrays:
    own, inner = self.options, self.term.params(self._behind(sizes))
    heads = (perceptron.variables((sizes.embed_dim, own.hidden, own.dim), number=number) for number in range(own.heads))
    return {
      f"head_{number}": {"perceptron": head, **({"term": inner} if inner else {})} for number, head in enumerate(heads)
    }

  def state(self, sizes: Sizes) -> Arrays:
    inner = self.term.state(self._behind(sizes))
    return {f"head_{number}": inner for number in range(self.options.heads)} if inner else {}

  def _behind(self, sizes: Sizes) -> Sizes:
    return dataclasses.replace(sizes, embed_dim=self.options.dim)

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    total, after, metrics = 0.0, {}, {}
    for number in range(self.options.heads):
      name = f"head_{number}"
      head = params[name]

      def project(embeddings: jax.Array, head: Arrays = head) -> jax.Array:
        return l2_normalize(perceptron.apply(head["perceptron"], embeddings.astype("float32"))).astype(embeddings.dtype)

      behind = pairs.map(project)
      # Nothing learns from what the moving average of the towers makes, the head included.
      slow = jax.lax.stop_gradient((behind.average_image, behind.average_text))
      behind = dataclasses.replace(behind, average_image=slow[0], average_text=slow[1])
      value, remembered, own = self.term(behind, head.get("term", {}), state.get(name, {}), **exchange)
      total += value
      after |= {name: remembered} if name in state else {}
      metrics = {part: metrics.get(part, 0.0) + one / self.options.heads for part, one in own.items()}
    return total, after, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedHead(WrapsTerm):
  """Another term of reweighted embeddings, in which feature j is divided by `kappa**j` and all are normalised anew.

  The head has no parameters and takes the place of a learned one: features that come late are felt little by the loss,
  and stay nearer to what the towers know of an image than to what a caption asks for.

  Attributes:
    of: the name of the term. Its options are those of `loss_options` under that name.
    kappa: ratio of the weights of a feature and the next; 1 changes nothing. The last of 512 features weighs 0.006 with
      1.01, and nothing with 1.2.

  The fixed reweighting head of "Investigating the Benefits of Projection Head for Representation Learning" (arXiv
  2403.11391).
  """

  of: str = "softmax"
  kappa: float = within(Range(1), 1.01)

  separates: ClassVar[bool] = True

  def around(self, term: GlobalTerm) -> GlobalTerm:
    return _Reweighted(options=self, term=term)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reweighted(AroundTerm):
  """A term of embeddings whose features have fixed weights."""

  options: FixedHead

  def unlearned(self, pairs: int) -> float | None:
    return self.term.unlearned(pairs)

  def params(self, sizes: Sizes) -> Arrays:
    return self.term.params(sizes)

  def state(self, sizes: Sizes) -> Arrays:
    return self.term.state(sizes)

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    # A weight that is too small for float32 is 0, as is what it adds to a similarity.
    weights = np.float32(np.power(self.options.kappa, -np.arange(pairs.image.shape[1], dtype=np.float64)))

    def reweight(embeddings: jax.Array) -> jax.Array:
      return l2_normalize(embeddings * weights).astype(embeddings.dtype)

    return self.term(pairs.map(reweight), params, state, **exchange)
