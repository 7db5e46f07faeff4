"""The term of the softmax loss."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import BELOW_ONE, COUNT, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(ComparesTowers, GlobalTerm):
  """The softmax loss, in which each image picks its text, and each text its image (`losses.softmax_loss`).

  Attributes:
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  label_smoothing: float = within(BELOW_ONE, 0.0)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def unlearned(self, pairs: int) -> float:
    return (len(self.towers) - 1) * math.log(pairs)

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.softmax_loss,
      logit_scale=pairs.logit_scale,
      group=pairs.keys,
      label_smoothing=self.label_smoothing,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
