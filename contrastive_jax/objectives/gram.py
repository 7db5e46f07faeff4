"""The term of the volumes that embeddings of several towers span."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import BELOW_ONE, COUNT, POSITIVE, within
from contrastive_jax.errors import UserError
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRAM(ComparesTowers, GlobalTerm):
  """The softmax loss of the volumes that an anchor spans with the other embeddings of a pair (`losses.gram_loss`).

  Attributes:
    temperature: divisor of the volumes; None takes that of the model, which is then trained too.
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    strategy: "gather" holds the other embeddings of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the two or three towers, the anchor first.
  """

  temperature: float | None = within(POSITIVE, None)
  label_smoothing: float = within(BELOW_ONE, 0.1)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if len(self.towers) > 3:
      raise UserError(f"towers={self.towers} are more than three, whose volume is not known here: name two or three")

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.gram_loss(
      [pairs.of(tower) for tower in self.towers],
      logit_scale=scale_of(pairs, self.temperature),
      label_smoothing=self.label_smoothing,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    return loss, state, metrics
