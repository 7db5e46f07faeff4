"""The term of the softmax loss with mixtures of hard negatives."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, Range, within
from contrastive_jax.losses import pairwise
from contrastive_jax.objectives import draws
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCHi(ComparesTowers, GlobalTerm):
  """The softmax loss with further negatives, mixed of the hardest ones (`losses.mixed_negatives_loss`).

  What is mixed follows from the pairs of the batch, on every mesh alike.

  Attributes:
    hardest: number of hardest negatives of each image and text that are mixed; at most all of them.
    mixed: number of mixtures for each image and text.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  hardest: int = within(Range(2, 4096), 32)
  mixed: int = within(Range(1, 4096), 16)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    others = len(pairs.image) * pairwise.device_count(axes) - 1
    hardest = min(self.hardest, max(others, 1))
    first, apart, share = jax.random.split(draws.batch_key(pairs, axes), 3)

    def draw(count):
      shape = count, self.mixed
      one = jax.random.randint(first, shape, 0, hardest)
      # Two different ones, where there are two.
      other = (one + jax.random.randint(apart, shape, min(1, hardest - 1), hardest)) % hardest
      return jnp.stack([one, other], axis=-1), jax.random.uniform(share, shape)

    picks, shares = draws.of_pairs(draw, pairs, axes)
    loss = functools.partial(
      losses.mixed_negatives_loss,
      picks=picks,
      shares=shares,
      logit_scale=pairs.logit_scale,
      hardest=hardest,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
