"""The terms of losses that see the embeddings of all towers at once, as views of a pair."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewInfoNCE(ComparesTowers, GlobalTerm):
  """The softmax loss of all views of a pair in one fraction, MV-InfoNCE (`losses.multi_view_softmax_loss`).

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which is then trained too.
    intra_modal: whether images are also compared with images and texts with texts, as in the authors' code.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers whose embeddings are the views.
  """

  temperature: float | None = within(POSITIVE, None)
  intra_modal: bool = True
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.multi_view_softmax_loss(
      [pairs.of(tower) for tower in self.towers],
      logit_scale=scale_of(pairs, self.temperature),
      intra_modal=self.intra_modal,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    return loss, state, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiViewDHEL(ComparesTowers, GlobalTerm):
  """Attraction of all views of a pair, and repulsion within each view, MV-DHEL (`losses.decoupled_views_loss`).

  A logit scale that is learned from it could grow without bound. The temperature is therefore the term's own, or the
  model's as a constant: the model's logit scale has no gradient from this term.

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which another term then has to train.
    with_self: whether each embedding is also compared with itself, and both orders of two views count, as in the
      authors' README; their code does neither. No similarity is larger than this one, which weakens the repulsion.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers whose embeddings are the views.
  """

  temperature: float | None = within(POSITIVE, 0.5)
  with_self: bool = False
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.decoupled_views_loss(
      [pairs.of(tower) for tower in self.towers],
      logit_scale=scale_of(pairs, self.temperature, constant=True),
      with_self=self.with_self,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    return loss, state, metrics
