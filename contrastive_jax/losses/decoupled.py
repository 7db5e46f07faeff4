"""The decoupled softmax loss (DCL), whose denominator has no positive, and its weighted form (DCLW)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.clusters import apart
from contrastive_jax.losses.softmax import weighted_softmax_loss


def decoupled_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  sigma: float | None = None,
  through_weights: bool = False,
  intra_modal: bool = False,
  clusters: Sequence[Int[Array, "pairs"]] = (),
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-w_i s_ii + log sum_{j != i} e^s_ij`, the mean over pairs and both directions.

  It has no lower bound in the logit scale: whoever learns the scale must not learn it from this loss, and nothing here
  stops its gradient.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    sigma: None for weights of 1; else they are `2 - pairs softmax_i(cos_ii / sigma)` over the global batch, whose mean
      is 1: pairs that agree already count less.
    through_weights: whether gradients flow through these weights.
    intra_modal: whether images are negatives of images and texts of texts, too.
    clusters: the number of the cluster of each pair, for each of several clusterings. A negative then weighs as much as
      the share of them that has it in another cluster than the pair, which is a constant to the gradient.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    As `softmax_loss`. A pair without negatives counts 0.

  Raises:
    UserError: for an unknown strategy, a tile below 1, a sigma that is not above 0, or clusters with `intra_modal`.

  Yeh et al., "Decoupled Contrastive Learning" (arXiv 2110.06848), equations 5 and 6. With clusters it is the loss
  of MEOW (SDM 2023) less the logarithm of the number of clusterings, from both sides.

  Examples:
    >>> both = jnp.eye(2)
    >>> float(decoupled_loss(both, both, logit_scale=1.0)[0]), float(decoupled_loss(both, both, logit_scale=9.0)[0])
    (-1.0, -9.0)
  """
  if clusters and intra_modal:
    raise UserError("clusters weigh the negatives between the towers alone: leave intra_modal=True or clusters out")
  weight = 1.0
  if sigma is not None:
    if not sigma > 0:
      raise UserError(f"sigma={sigma} must be above 0")
    weight = _weights(negatives.positive_similarities(image, text) / sigma, pairwise.mesh_axes(axis_name))
    weight = weight if through_weights else lax.stop_gradient(weight)
  return weighted_softmax_loss(
    image,
    text,
    logit_scale=logit_scale,
    positive_coefficient=0.0,
    positive_weight=weight,
    intra_modal=intra_modal,
    negative_weight=apart if clusters else None,
    image_side=tuple(clusters),
    text_side=tuple(clusters),
    group=group,
    axis_name=axis_name,
    strategy=strategy,
    tile=tile,
    ring_order=ring_order,
  )


def _weights(values: Float[Array, "pairs"], axes: tuple[str, ...]) -> Float[Array, "pairs"]:
  largest = jnp.max(lax.stop_gradient(values))
  terms = jnp.exp(values - (lax.pmax(largest, axes) if axes else largest))
  pairs = len(values) * pairwise.device_count(axes)
  return 2 - pairs * terms / pairwise.global_sum(jnp.sum(terms), axes)
