"""The softmax loss with further negatives that are mixed from the hardest ones (MoCHi)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.nearest import over_nearest_negatives
from contrastive_jax.losses.softmax import weighted_softmax_loss


def mixed_negatives_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  picks: Int[Array, "pairs mixed 2"],
  shares: Float[Array, "pairs mixed"],
  *,
  query_picks: Int[Array, "pairs more"] | None = None,
  query_shares: Float[Array, "pairs more"] | None = None,
  logit_scale: Float[Array, ""] | float,
  hardest: int,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which every image and every text also has mixtures of its hardest negatives.

  A mixture is `share first + (1 - share) second` of two of the hardest negatives, or of the image or text itself and
  one of them, normalised, and a constant to the gradient. Pairs that share a key are masked before these are chosen.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    picks: which two of the hardest negatives each mixture is made of, 0 for the hardest; for images and texts alike.
    shares: the share of the first of them.
    query_picks: which of the hardest negatives is mixed with the image or text itself, for further mixtures; None has
      none of these.
    query_shares: the share of the image or text itself in them, below 0.5 in the paper.
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
    As `softmax_loss`; mixtures count in its accuracies.

  Raises:
    UserError: as in `softmax_loss`, for `hardest` below 1, and for one of `query_picks` and `query_shares` alone.

  Kalantidis et al., "Hard Negative Mixing for Contrastive Learning" (arXiv 2010.01028), mixtures of two negatives and
  of the query with one, with the batch in place of a queue.

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
  if (query_picks is None) != (query_shares is None):
    raise UserError("query_picks and query_shares describe the same mixtures: give both, or neither")
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  keys = pairwise.keys_of(group, len(image), axes)

  def to_mixtures(anchors, found, absent, picks, shares, of_query):
    lines = jnp.arange(len(anchors))[:, None]

    def chosen(picks):
      """Returns negatives by their places among the hardest, and which of them there are."""
      places = hardest - 1 - picks
      return found.astype(dtype)[lines, places], ~absent[lines, places]

    def similarities(first, second, shares, there):
      mixture = shares[..., None] * first + (1 - shares[..., None]) * second
      # Opposite ones cancel.
      length = jnp.maximum(jnp.linalg.norm(mixture, axis=-1, keepdims=True), 1e-6)
      mixture = lax.stop_gradient(mixture / length)
      return jnp.where(there, negatives.similarities_to(anchors, mixture), -jnp.inf)

    (first, some), (second, more) = (chosen(picks[..., which]) for which in (0, 1))
    extra = similarities(first, second, shares, some & more)
    if of_query is None:
      return extra
    query_picks, query_shares = of_query
    negative, there = chosen(query_picks)
    with_query = similarities(anchors.astype(dtype)[:, None], negative, query_shares, there)
    return jnp.concatenate([extra, with_query], axis=1)

  of_query = None if query_picks is None else (query_picks, query_shares)

  def extra(anchors, others):
    beside = picks, shares, of_query
    return over_nearest_negatives(to_mixtures, anchors, others, keys, hardest, *beside, tile=tile, axes=axes)

  return weighted_softmax_loss(
    image,
    text,
    logit_scale=logit_scale,
    image_extra=extra(image, text),
    text_extra=extra(text, image),
    group=group,
    axis_name=axis_name,
    strategy=strategy,
    tile=tile,
    ring_order=ring_order,
  )
