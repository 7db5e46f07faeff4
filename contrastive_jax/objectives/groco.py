"""The term of contrastive learning by sorting."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, Range, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroCo(ComparesTowers, GlobalTerm):
  """A differentiable sorting network that ranks the positive above the nearest negatives (`losses.sorting_loss`).

  The model's logit scale has no part in it. The other side of all devices is gathered.

  Attributes:
    top_k: number of negatives in each group.
    steepness: how abruptly the network exchanges two similarities, which takes the place of a logit scale.
    tile: largest number of columns of similarities that exist at once; None is 512.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  top_k: int = within(Range(1, 128), 10)
  steepness: float = within(POSITIVE, 1.0)
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.sorting_loss, top_k=self.top_k, steepness=self.steepness, group=pairs.keys, tile=self.tile, **exchange
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
