"""The term of the sigmoid loss."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.errors import UserError
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(ComparesTowers, GlobalTerm):
  """The sigmoid loss, in which every pair of the batch is a binary classification of its own (`losses.sigmoid_loss`).

  Attributes:
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    balance_bias: whether the logit bias of a new run begins where, in the first batch, as many pairs are expected to
      match as do (`losses.balanced_bias`), in place of `model.init_logit_bias`.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  strategy: str = "ring"
  tile: int | None = within(COUNT, None)
  balance_bias: bool = False

  separates: ClassVar[bool] = True
  leaves_out: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.balance_bias and self.towers != ("image", "text"):
      raise UserError(f"balance_bias=True is for images and texts alone, not towers={self.towers}: turn it off")

  def unlearned(self, pairs: int) -> float:
    # Where every logit says that one pair in so many matches.
    return (len(self.towers) - 1) * (math.log(pairs) + (pairs - 1) * -math.log1p(-1 / pairs) if pairs > 1 else 0.0)

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.sigmoid_loss,
      logit_scale=pairs.logit_scale,
      logit_bias=pairs.logit_bias,
      present=pairs.present,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
