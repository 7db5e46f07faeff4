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
    mixed: number of mixtures of two negatives for each image and text.
    mixed_with_query: number of mixtures of the image or text itself with a negative, which has the larger share. They
      lie between the modalities, and so are hard for whatever the gap between these is, not for what is shown.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  hardest: int = within(Range(2, 4096), 32)
  mixed: int = within(Range(1, 4096), 16)
  mixed_with_query: int = within(Range(0, 4096), 0)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    others = len(pairs.image) * pairwise.device_count(axes) - 1
    hardest = min(self.hardest, max(others, 1))
    key = draws.batch_key(pairs, axes)
    first, apart, share = jax.random.split(key, 3)

    def draw(count):
      shape = count, self.mixed
      one = jax.random.randint(first, shape, 0, hardest)
      # Two different ones, where there are two.
      other = (one + jax.random.randint(apart, shape, min(1, hardest - 1), hardest)) % hardest
      return jnp.stack([one, other], axis=-1), jax.random.uniform(share, shape)

    def draw_with_query(count):
      of_pick, of_share = jax.random.split(jax.random.fold_in(key, 3))
      shape = count, self.mixed_with_query
      return jax.random.randint(of_pick, shape, 0, hardest), jax.random.uniform(of_share, shape, maxval=0.5)

    picks, shares = draws.of_pairs(draw, pairs, axes)
    query_picks, query_shares = draws.of_pairs(draw_with_query, pairs, axes) if self.mixed_with_query else (None, None)
    loss = functools.partial(
      losses.mixed_negatives_loss,
      picks=picks,
      shares=shares,
      query_picks=query_picks,
      query_shares=query_shares,
      logit_scale=pairs.logit_scale,
      hardest=hardest,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
