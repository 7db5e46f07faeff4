"""The term of contrastive attraction and repulsion."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, NOT_NEGATIVE, POSITIVE, Range, within
from contrastive_jax.errors import require_known
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs

COSTS = ("euclidean", "rbf")
# Shares that are exponentials of four times the scale must not overflow.
_SHARPEST = Range(0, 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CACR(ComparesTowers, GlobalTerm):
  """Attraction to far positives and repulsion from near negatives (`losses.attraction_repulsion_loss`).

  The model's logit scale has no part in it.

  Attributes:
    cost: "euclidean", or "rbf", which takes only `temperature` and equals a scaled softmax loss for two towers
      (`losses.reweighted_softmax_loss`).
    attraction_scale: how sharply far positives are preferred; it has no effect for two towers.
    repulsion_scale: how sharply near negatives are preferred.
    attraction_weight: weight of the distances to positives.
    repulsion_weight: weight of the distances to negatives.
    temperature: divisor of similarities and distances of the "rbf" cost.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers whose embeddings are the views; the "rbf" cost compares the first with each other one.
  """

  cost: str = "euclidean"
  attraction_scale: float = within(_SHARPEST, 1.0)
  repulsion_scale: float = within(_SHARPEST, 1.0)
  attraction_weight: float = within(POSITIVE, 1.0)
  repulsion_weight: float = within(NOT_NEGATIVE, 1.0)
  temperature: float = within(POSITIVE, 1.0)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    require_known("cost", self.cost, COSTS)

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    views = [pairs.of(tower) for tower in self.towers]
    options = {"group": pairs.keys, "strategy": self.strategy, "tile": self.tile, **exchange}
    if self.cost == "rbf":
      loss, metrics = losses.reweighted_softmax_loss(views, temperature=self.temperature, **options)
    else:
      loss, metrics = losses.attraction_repulsion_loss(
        views,
        attraction_scale=self.attraction_scale,
        repulsion_scale=self.repulsion_scale,
        attraction_weight=self.attraction_weight,
        repulsion_weight=self.repulsion_weight,
        **options,
      )
    return loss, state, metrics
