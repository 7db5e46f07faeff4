"""The softmax loss with further negatives that are mixed from the hardest ones (MoCHi)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.nearest import nearest_negatives
from contrastive_jax.losses.softmax import weighted_softmax_loss


def mixed_negatives_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  picks: Int[Array, "pairs mixed 2"],
  shares: Float[Array, "pairs mixed"],
  *,
  logit_scale: Float[Array, ""] | float,
  hardest: int,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which every image and every text also has mixtures of its hardest negatives.

  A mixture is `share first + (1 - share) second` of two of the hardest negatives, normalised, and a constant to the
  gradient. Pairs that share a key are masked before these are chosen.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    picks: which two of the hardest negatives each mixture is made of, 0 for the hardest; for images and texts alike.
    shares: the share of the first of them.
    logit_scale: multiplier of the similarities, already exponentiated.
    hardest: number of hardest negatives that are mixed. Mixtures of negatives that do not exist are left out.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device. The hardest are looked for in what is
      gathered from all devices.
    strategy: of the softmax: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    As `softmax_loss`; mixtures count in its accuracies. It holds the embeddings of all hardest negatives and mixtures.

  Raises:
    UserError: as in `softmax_loss`, and for `hardest` below 1.

  Kalantidis et al., "Hard Negative Mixing for Contrastive Learning" (arXiv 2010.01028), mixtures of two negatives, with
  the batch in place of a queue.

  Examples:
    >>> both = jnp.eye(3)
    >>> picks, shares = jnp.array([[[0, 1]]] * 3), jnp.full((3, 1), 0.5)
    >>> loss, _ = mixed_negatives_loss(both, both, picks, shares, logit_scale=1.0, hardest=2)
    >>> round(float(loss), 4)  # log(1 + 3 e^-1): two negatives and their mixture.
    0.7437
  """
  pairwise.check(strategy, tile)
  if hardest < 1:
    raise UserError(f"hardest={hardest} must be at least 1")
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  keys = pairwise.keys_of(group, len(image), axes)

  def similarities(anchors, others):
    found, absent = nearest_negatives(anchors, others, keys, hardest, tile=tile, axes=axes)
    lines, places = jnp.arange(len(anchors))[:, None], hardest - 1 - picks
    first, second = (found.astype(dtype)[lines, places[..., which]] for which in (0, 1))
    mixture = shares[..., None] * first + (1 - shares[..., None]) * second
    # Opposite ones cancel.
    length = jnp.maximum(jnp.linalg.norm(mixture, axis=-1, keepdims=True), 1e-6)
    mixture = lax.stop_gradient(mixture / length)
    there = ~jnp.any(absent[lines[..., None], places], axis=-1)
    return jnp.where(there, negatives.similarities_to(anchors, mixture), -jnp.inf)

  return weighted_softmax_loss(
    image,
    text,
    logit_scale=logit_scale,
    image_extra=similarities(image, text),
    text_extra=similarities(text, image),
    group=group,
    axis_name=axis_name,
    strategy=strategy,
    tile=tile,
    ring_order=ring_order,
  )
