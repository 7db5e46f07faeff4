"""The term of the sigmoid loss."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(ComparesTowers, GlobalTerm):
  """The sigmoid loss, in which every pair of the batch is a binary classification of its own (`losses.sigmoid_loss`).

  Attributes:
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  strategy: str = "ring"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.sigmoid_loss,
      logit_scale=pairs.logit_scale,
      logit_bias=pairs.logit_bias,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
