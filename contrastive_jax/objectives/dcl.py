"""The term of the decoupled softmax loss."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCL(ComparesTowers, GlobalTerm):
  """The decoupled softmax loss, whose denominator leaves the positive out (`losses.decoupled_loss`).

  A logit scale that is learned from it would grow without bound. The temperature is therefore the term's own, or the
  model's as a constant: the model's logit scale has no gradient from this term.

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which another term then has to train.
    weighted: whether pairs that agree already count less (DCLW).
    sigma: divisor of the similarities in these weights.
    through_weights: whether gradients flow through these weights.
    intra_modal: whether images are negatives of images and texts of texts, too, as in the paper.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  temperature: float | None = within(POSITIVE, 0.1)
  weighted: bool = False
  sigma: float = within(POSITIVE, 0.5)
  through_weights: bool = False
  intra_modal: bool = False
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.decoupled_loss,
      logit_scale=scale_of(pairs, self.temperature, constant=True),
      sigma=self.sigma if self.weighted else None,
      through_weights=self.through_weights,
      intra_modal=self.intra_modal,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
