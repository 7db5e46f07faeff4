"""The term of the sigmoid loss."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.objectives.term import GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid(GlobalTerm):
  """The sigmoid loss, in which every pair of the batch is a binary classification of its own (`losses.sigmoid_loss`).

  Attributes:
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  strategy: str = "ring"
  tile: int | None = None

  separates: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.sigmoid_loss(
      pairs.image,
      pairs.text,
      logit_scale=pairs.logit_scale,
      logit_bias=pairs.logit_bias,
      group=pairs.keys,
      **dataclasses.asdict(self),
      **exchange,
    )
    return loss, state, metrics
