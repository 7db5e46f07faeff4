"""The term of the softmax loss."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import BELOW_ONE, COUNT, Range, within
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first

DIRECTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(ComparesTowers, GlobalTerm):
  """The softmax loss, in which each image picks its text, and each text its image (`losses.softmax_loss`).

  Attributes:
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    directions: "mean" of the two directions as in CLIP, or their "sum" as in ALIGN.
    mean_negatives: whether the negatives enter as their mean, as in cMIM; the loss does not grow with the batch then.
    hard_top_k: number of nearest negatives that each image and each text keeps; None keeps all.
    hard_share: share of the other pairs of the batch that each keeps instead, the nearest ones; None keeps all.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  label_smoothing: float = within(BELOW_ONE, 0.0)
  directions: str = "mean"
  mean_negatives: bool = False
  hard_top_k: int | None = within(COUNT, None)
  hard_share: float | None = within(Range(0, 1, above=True), None)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    require_known("directions", self.directions, DIRECTIONS)
    if self.hard_top_k is not None and self.hard_share is not None:
      raise UserError(
        f"hard_top_k={self.hard_top_k} and hard_share={self.hard_share} both say how many negatives are kept: leave one"
        " of them at None"
      )
    if self._is_hard and (self.label_smoothing or self.mean_negatives):
      raise UserError(
        f"label_smoothing={self.label_smoothing} and mean_negatives={self.mean_negatives} are over all negatives: leave"
        " them out, or keep all negatives by hard_top_k=None and hard_share=None"
      )

  @property
  def _is_hard(self) -> bool:
    return self.hard_top_k is not None or self.hard_share is not None

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    options = {
      "logit_scale": pairs.logit_scale,
      "group": pairs.keys,
      "strategy": self.strategy,
      "tile": self.tile,
      **exchange,
    }
    if self._is_hard:
      loss = functools.partial(losses.hard_softmax_loss, top_k=self.hard_top_k, share=self.hard_share, **options)
    else:
      smoothing, mean = self.label_smoothing, self.mean_negatives
      loss = functools.partial(losses.weighted_softmax_loss, label_smoothing=smoothing, mean_negatives=mean, **options)
    value, metrics = against_first(pairs, self.towers, loss)
    return value * (2 if self.directions == "sum" else 1), state, metrics
