"""The term of the softmax loss."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax import losses
from contrastive_jax.bounds import BELOW_ONE, COUNT, NOT_NEGATIVE, Range, within
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.clusters import apart
from contrastive_jax.losses.negatives import similarities_to
from contrastive_jax.objectives import clusters
from contrastive_jax.objectives.term import (
  WEIGHTS,
  Arrays,
  ComparesTowers,
  GlobalTerm,
  Pairs,
  Sizes,
  against_first,
)

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
    clusters: numbers of clusters, one for each run of k-means over the embeddings that the first tower makes of a
      batch. A negative weighs as much as the share of the runs that has it in another cluster than the pair, as in
      MEOW: 0 or 1 of a single run, and between them of several. Empty weighs all alike.
    pair_weights: whether pairs count by their weights, which a source reads from its column `weight_key`.
    hard_captions: number of wrong captions that are negatives of each image beside the texts of the batch. A source
      reads them from its column `wrong_caption_key`, or `data.swap_words` makes them.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  label_smoothing: float = within(BELOW_ONE, 0.0)
  directions: str = "mean"
  mean_negatives: bool = False
  hard_top_k: int | None = within(COUNT, None)
  hard_share: float | None = within(Range(0, 1, above=True), None)
  clusters: tuple[int, ...] = within(Range(2), ())
  pair_weights: bool = False
  hard_captions: int = within(NOT_NEGATIVE, 0)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def unlearned(self, pairs: int) -> float | None:
    if self.clusters:
      return None  # It depends on the sizes of the clusters.
    negatives = pairs - 1
    if self.hard_top_k is not None:
      negatives = min(negatives, self.hard_top_k)
    if self.hard_share is not None:
      negatives *= self.hard_share
    negatives = min(negatives, 1) if self.mean_negatives else negatives
    factor = 2 if self.directions == "sum" else 1
    images = math.log1p(negatives + self.hard_captions)
    return factor * (len(self.towers) - 1) * (images + math.log1p(negatives)) / 2

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
    if self.clusters and (self._is_hard or self.label_smoothing or self.mean_negatives):
      raise UserError(
        f"clusters={self.clusters} weigh the negatives, which label_smoothing, mean_negatives, hard_top_k and"
        " hard_share count alike: leave these at 0, False, None and None"
      )
    if self.hard_captions and (self._is_hard or self.towers != ("image", "text")):
      raise UserError(
        f"hard_captions={self.hard_captions} are negatives of images beside all texts: leave towers={self.towers} at"
        " images and texts, and hard_top_k and hard_share at None"
      )

  def state(self, sizes: Sizes) -> Arrays:
    clusters.check(self.clusters, sizes, "loss_options.softmax.clusters")
    return {}

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({WEIGHTS} if self.pair_weights else ())

  @property
  def leaves_out(self) -> bool:
    return not self._is_hard

  @property
  def captions_needed(self) -> int:
    return self.hard_captions

  @property
  def _is_hard(self) -> bool:
    return self.hard_top_k is not None or self.hard_share is not None

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    options = {
      "logit_scale": pairs.logit_scale,
      "group": pairs.keys,
      "strategy": self.strategy,
      "tile": self.tile,
      "pair_weights": pairs.weights if self.pair_weights else None,
      **({} if self._is_hard else {"present": pairs.present}),
      **exchange,
    }
    if self._is_hard:
      loss = functools.partial(losses.hard_softmax_loss, top_k=self.hard_top_k, share=self.hard_share, **options)
    else:
      smoothing, mean = self.label_smoothing, self.mean_negatives
      if self.clusters:
        axes = pairwise.mesh_axes(exchange["axis_name"])
        ids = clusters.of_pairs(pairs, self.towers[0], self.clusters, axes)
        options |= {"negative_weight": apart, "image_side": ids, "text_side": ids}
      options["image_extra"] = self._to_hard_captions(pairs) if self.hard_captions else None
      loss = functools.partial(losses.weighted_softmax_loss, label_smoothing=smoothing, mean_negatives=mean, **options)
    value, metrics = against_first(pairs, self.towers, loss)
    return value * (2 if self.directions == "sum" else 1), state, metrics

  def _to_hard_captions(self, pairs: Pairs) -> Float[Array, "pairs captions"]:
    """Returns the similarities of images to their wrong captions, minus infinity where there is none."""
    hard, there = (leaf[:, : self.hard_captions] for leaf in (pairs.hard_text, pairs.hard_there))
    return jnp.where(there, similarities_to(pairs.image, hard), -jnp.inf)
