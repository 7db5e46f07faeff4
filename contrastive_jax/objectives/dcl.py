"""The term of the decoupled softmax loss."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, Range, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.objectives import clusters
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import Arrays, ComparesTowers, GlobalTerm, Pairs, Sizes, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCL(ComparesTowers, GlobalTerm):
  """The decoupled softmax loss, whose denominator leaves the positive out (`losses.decoupled_loss`).

  A logit scale that is learned from it would grow without bound. The temperature is therefore the term's own, or the
  model's as a constant: the model's logit scale has no gradient from this term.

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which another term then has to train.
    weighted: whether pairs that agree already count less (DCLW).
    sigma: divisor of the similarities in these weights.
    through_weights: whether gradients flow through these weights.
    intra_modal: whether images are negatives of images and texts of texts, too, as in the paper.
    clusters: numbers of clusters, one for each run of k-means over the embeddings that the first tower makes of a
      batch. A negative weighs as much as the share of the runs that has it in another cluster than the pair (MEOW): 0
      or 1 of a single run, and between them of several. Empty weighs all alike.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  temperature: float | None = within(POSITIVE, 0.1)
  weighted: bool = False
  sigma: float = within(POSITIVE, 0.5)
  through_weights: bool = False
  intra_modal: bool = False
  clusters: tuple[int, ...] = within(Range(2), ())
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.clusters and self.intra_modal:
      raise UserError(
        f"clusters={self.clusters} weigh the negatives between the towers alone, which intra_modal=True adds to: leave"
        " one of them out"
      )

  def state(self, sizes: Sizes) -> Arrays:
    clusters.check(self.clusters, sizes, "loss_options.dcl.clusters")
    return {}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    loss = functools.partial(
      losses.decoupled_loss,
      logit_scale=scale_of(pairs, self.temperature, constant=True),
      sigma=self.sigma if self.weighted else None,
      through_weights=self.through_weights,
      intra_modal=self.intra_modal,
      clusters=clusters.of_pairs(pairs, self.towers[0], self.clusters, axes),
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
