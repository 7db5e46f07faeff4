"""The term of the loss that compares every positive with every negative."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class MannWhitney(ComparesTowers, GlobalTerm):
  """The mean logistic loss of every positive against every negative of the batch (`losses.mann_whitney_loss`).

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which is then trained too.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None is 128.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  temperature: float | None = within(POSITIVE, None)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.mann_whitney_loss,
      logit_scale=scale_of(pairs, self.temperature),
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
