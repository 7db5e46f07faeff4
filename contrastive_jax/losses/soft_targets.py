"""The softmax loss whose targets are a softmax over similarities within one modality (soft-CLIP)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.lines import (
  COLUMN_LOG_SUM_EXP,
  COLUMN_SUM,
  ROW_LOG_SUM_EXP,
  ROW_SUM,
  reduce_negatives,
  to_rows,
)


def soft_target_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  target_temperature: float = 0.125,
  through_targets: bool = True,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes both cross-entropies of a softmax loss with targets `softmax_j(cos(text_i, text_j) / target_temperature)`.

  A caption that resembles that of the pair is then partly right. Exchange the sides to take targets from the images.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs, which give the targets.
    logit_scale: multiplier of the similarities, already exponentiated.
    target_temperature: divisor of the similarities of texts; towards 0 the loss becomes `softmax_loss`.
    through_targets: whether gradients flow through the targets, as in the authors' code.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives and targets; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The mean of both directions over the global batch and `{"loss_image_to_text", "loss_text_to_image"}`, equal on every
    device. Eight products of size pairs x pairs x dim for value and gradient.

  Raises:
    UserError: for an unknown strategy, a tile below 1 or a temperature that is not above 0.

  Kumar et al., "Harnessing Shared Relations via Multimodal Mixup Contrastive Learning" (arXiv 2409.17777).

  Examples:
    >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> from_texts, from_images = (
    ...   soft_target_loss(*sides, logit_scale=8.0)[0] for sides in ((image, text), (text, image))
    ... )
    >>> round(float(from_texts), 4), round(float(from_images), 4)
    (0.2445, 0.0581)
  """
  pairwise.check(strategy, tile)
  if not target_temperature > 0:
    raise UserError(f"target_temperature={target_temperature} must be above 0")
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  own = negatives.positive_similarities(image, text)
  target = text if through_targets else lax.stop_gradient(text)
  length = negatives.positive_similarities(target, target)

  def matrices(rows, columns):
    similarities = negatives.matmul(rows["image"], columns["text"], "id,jd->ij")
    alike = negatives.matmul(rows["target"], columns["target"], "id,jd->ij")
    found = []
    for line in (lambda name: rows[name][:, None], lambda name: columns[name][None, :]):
      # Relative to the pair's own, which is the largest.
      weights = jnp.exp((alike - line("length")) / target_temperature)
      margins = (similarities - line("own")) * rows["scale"][:, None]
      found += [margins, weights * margins, weights]
    return tuple(found)

  totals = reduce_negatives(
    matrices,
    (ROW_LOG_SUM_EXP, ROW_SUM, ROW_SUM, COLUMN_LOG_SUM_EXP, COLUMN_SUM, COLUMN_SUM),
    {"image": image, "target": target, "own": own, "length": length, "scale": to_rows(scale, image, axes)},
    {"text": text, "target": target, "own": own, "length": length},
    pairwise.keys_of(group, len(image), axes),
    negatives.Sweep(axes, strategy, tile, ring_order),
  )
  pairs = len(image) * pairwise.device_count(axes)
  parts = {}
  for direction, (margin, weighted, weights) in {"image_to_text": totals[:3], "text_to_image": totals[3:]}.items():
    lines = jnp.logaddexp(0, margin) - weighted / (1 + weights)
    parts[f"loss_{direction}"] = pairwise.global_sum(jnp.sum(lines), axes) / pairs
  return (parts["loss_image_to_text"] + parts["loss_text_to_image"]) / 2, parts
