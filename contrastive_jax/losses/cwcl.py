"""Continuously weighted contrastive loss (CWCL): targets that follow the similarities within one modality."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.lines import COLUMN_LOG_SUM_EXP, ROW_LOG_SUM_EXP, ROW_SUM, reduce_negatives, to_rows
from contrastive_jax.losses.negatives import matmul


def cwcl_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-mean_i sum_j w_ij log softmax_j(s_ij) / sum_j w_ij`, plus the cross-entropy from texts to images.

  The weight of two pairs is `w_ij = (1 + cos(image_i, image_j)) / 2`, so that an image is drawn to the texts of images
  that look like it, too. Weights are constants to the gradient. The images are the modality that is trusted, such as a
  frozen tower's; exchange the two sides to trust the texts.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives and targets; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The sum of both directions over the global batch and `{"loss_image_to_text", "loss_text_to_image"}`, equal on every
    device. Six products of size pairs x pairs x dim for value and gradient, and images travel beside texts.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  Srinivasa et al., "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss" (arXiv 2309.14580).

  Examples:
    >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> _, parts = cwcl_loss(image, text, logit_scale=1.0)
    >>> [round(float(part), 4) for part in parts.values()]
    [0.6421, 0.4557]
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  own = negatives.positive_similarities(image, text)
  trusted = lax.stop_gradient(image)
  weighted, weights, of_images, of_texts = reduce_negatives(
    _matrices,
    (ROW_SUM, ROW_SUM, ROW_LOG_SUM_EXP, COLUMN_LOG_SUM_EXP),
    {"image": image, "trusted": trusted, "own": own, "scale": to_rows(scale, image, axes)},
    {"text": text, "trusted": trusted, "own": own},
    pairwise.keys_of(group, len(image), axes),
    negatives.Sweep(axes, strategy, tile, ring_order),
  )
  # Logits are counted from that of the positive, whose own is 0.
  own_weight = (1 + negatives.positive_similarities(trusted, trusted)) / 2
  pairs = len(image) * pairwise.device_count(axes)
  lines = {
    "loss_image_to_text": jnp.logaddexp(0, of_images) - weighted / (own_weight + weights),
    "loss_text_to_image": jnp.logaddexp(0, of_texts),
  }
  parts = {name: pairwise.global_sum(jnp.sum(line), axes) / pairs for name, line in lines.items()}
  return parts["loss_image_to_text"] + parts["loss_text_to_image"], parts


def _matrices(rows, columns):
  similarities = matmul(rows["image"], columns["text"], "id,jd->ij")
  # A cosine may be rounded to less than -1.
  weights = jnp.maximum(1 + matmul(rows["trusted"], columns["trusted"], "id,jd->ij"), 0) / 2
  weights = lax.stop_gradient(weights)
  to_texts, to_images = (
    (similarities - own) * rows["scale"][:, None] for own in (rows["own"][:, None], columns["own"][None, :])
  )
  return weights * to_texts, weights, to_texts, to_images
