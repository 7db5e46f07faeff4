"""The term of the continuously weighted contrastive loss."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class CWCL(ComparesTowers, GlobalTerm):
  """A softmax loss whose targets follow the similarities within a modality that is trusted (`losses.cwcl_loss`).

  Attributes:
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the first is the one that is trusted, best a frozen one; each other one is compared with it, in a sum of
      losses.
  """

  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.cwcl_loss,
      logit_scale=pairs.logit_scale,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
