"""The term in which clusters of pairs repel each other by their sums."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import POSITIVE, Range, within
from contrastive_jax.losses import pairwise
from contrastive_jax.objectives import clusters
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import Arrays, ComparesTowers, GlobalTerm, Pairs, Sizes, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class PamC(ComparesTowers, GlobalTerm):
  """Attraction within pairs, and repulsion between the sums of clusters of pairs (`losses.cluster_proxy_loss`).

  Devices exchange sums of clusters in place of embeddings. Pairs of one cluster do not repel each other: it stands
  beside a loss that tells them apart. K-means makes the clusters anew in each batch, where the authors learn centres.

  A logit scale that is learned from it could grow without bound. The temperature is therefore the term's own, or the
  model's as a constant: the model's logit scale has no gradient from this term.

  Attributes:
    clusters: number of clusters, at most the pairs of a batch.
    temperature: divisor of the similarities; None takes that of the model, which another term then has to train. The
      authors' 0.25 to 1.5 multiply: they are temperatures of 4 to 0.67.
    towers: the towers that are compared: the first, whose embeddings are clustered, with each other one, in a sum of
      losses.
  """

  clusters: int = within(Range(2), 64)
  temperature: float | None = within(POSITIVE, 1.0)

  compares_pairs: ClassVar[bool] = True

  def state(self, sizes: Sizes) -> Arrays:
    clusters.check((self.clusters,), sizes, "loss_options.pamc.clusters")
    return {}

  def __call__(self, pairs: Pairs, params, state, *, axis_name=None, **exchange: Any):
    axes = pairwise.mesh_axes(axis_name)
    (ids,) = clusters.of_pairs(pairs, self.towers[0], (self.clusters,), axes)
    loss = functools.partial(
      losses.cluster_proxy_loss,
      ids=ids,
      clusters=self.clusters,
      logit_scale=scale_of(pairs, self.temperature, constant=True),
      axis_name=axis_name,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
