"""The term against margins that grow without need."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginRegularizer(ComparesTowers, GlobalTerm):
  """How far pairs lie above their negatives, and these below the nearest one (`losses.margin_regularizer`).

  It works against the loss that it stands beside, and keeps that from driving embeddings further apart than their order
  needs. Its authors add it with a weight of 0.1 to a softmax loss. The model's logit scale has no part in it.

  Attributes:
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.margin_regularizer, group=pairs.keys, strategy=self.strategy, tile=self.tile, **exchange
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
