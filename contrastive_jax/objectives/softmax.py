"""The term of the softmax loss."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.objectives.term import GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(GlobalTerm):
  """The softmax loss, in which each image picks its text, and each text its image (`losses.softmax_loss`).

  Attributes:
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  label_smoothing: float = 0.0
  strategy: str = "gather"
  tile: int | None = None

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.softmax_loss(
      pairs.image,
      pairs.text,
      logit_scale=pairs.logit_scale,
      group=pairs.keys,
      **dataclasses.asdict(self),
      **exchange,
    )
    return loss, state, metrics
