"""The softmax (InfoNCE, CLIP) loss and the weighted family it belongs to."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import log_sum_exp


def softmax_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  logit_bias: Float[Array, ""] | float | None = None,
  label_smoothing: float = 0.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the mean of two cross-entropies: each image's text among all texts, each text's image among all images.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    logit_bias: accepted so that the losses are interchangeable; a softmax is unchanged by a common shift of its logits,
      so it has no effect and a gradient of zero.
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The loss of the global batch and `{"loss_image_to_text", "loss_text_to_image", "accuracy_image_to_text",
    "accuracy_text_to_image"}` (top-1 within the batch, where a tie is no hit), equal on every device. Gradients taken
    outside `jax.shard_map` are exact on any mesh.

  Raises:
    UserError: for an unknown strategy, a tile below 1 or a label smoothing outside [0, 1).

  Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020), figure 3;
  with label smoothing half of ALIGN's (arXiv 2102.05918), which adds the directions.

  Examples:
    >>> image, text = jnp.eye(2), jnp.eye(2)[::-1]  # Each image is nearest to the other's text.
    >>> loss, metrics = softmax_loss(image, text, logit_scale=1.0)
    >>> round(float(loss), 4), float(metrics["accuracy_image_to_text"])
    (1.3133, 0.0)
  """
  return weighted_softmax_loss(
    image,
    text,
    logit_scale=logit_scale,
    label_smoothing=label_smoothing,
    group=group,
    axis_name=axis_name,
    strategy=strategy,
    tile=tile,
    ring_order=ring_order,
  )


def weighted_softmax_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  positive_coefficient: float = 1.0,
  positive_weight: Float[Array, "pairs"] | float = 1.0,
  negative_weight: negatives.Weight | None = None,
  image_side: Any = None,
  text_side: Any = None,
  image_extra: Float[Array, "pairs _"] | None = None,
  text_extra: Float[Array, "pairs _"] | None = None,
  label_smoothing: float = 0.0,
  mean_negatives: bool = False,
  intra_modal: bool = False,
  pair_weights: Float[Array, "pairs"] | None = None,
  present: Bool[Array, "pairs"] | None = None,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-w s_ii + log(a e^s_ii + sum_j g_ij e^s_ij + sum_h e^s'_ih)`, the mean over pairs and both directions.

  InfoNCE is the default. a = 0 is the decoupled loss (DCL); it is unbounded below in the scale, which must then be
  fixed or clamped. g in {0, 1} selects hard negatives.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    positive_coefficient: the a of the formula, at least 0.
    positive_weight: the w of the formula.
    negative_weight: the g of the formula, a function of (image_side, text_side, logits) of a tile that returns the
      weights of the images' and of the texts' negatives; constants to the gradient. None is 1.
    image_side: pytree of arrays per pair that `negative_weight` sees for its rows.
    text_side: pytree of arrays per pair that `negative_weight` sees for its columns.
    image_extra: similarities of each image to further negatives of its own, before the scale; differentiable. A
      similarity of minus infinity is no negative.
    text_extra: similarities of each text to further negatives of its own.
    label_smoothing: share of the target spread evenly over all classes that are not masked; extra negatives are no
      classes here.
    mean_negatives: whether the first sum becomes a mean over the negatives of the line, so that the loss of
      similarities that are all alike does not grow with the batch. It takes no `negative_weight`.
    intra_modal: whether images are negatives of images and texts of texts, too; weights and label smoothing leave them
      out.
    pair_weights: how much each pair counts in the mean over pairs, at least 0; None is 1. They are constants to the
      gradient. A pair of weight 0 is still a negative of others; where all are 0, so is the loss.
    present: which pairs there are: the value and all gradients are those of a batch without the others. None is all.
    group: pairs of equal group are left out of each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    As `softmax_loss`. A pair whose denominator is empty (a = 0 and no negatives) counts 0.

  Raises:
    UserError: as in `softmax_loss`, and for a negative `positive_coefficient` or weights of a mean.

  Examples:
    >>> both = jnp.eye(2)
    >>> plain, _ = softmax_loss(both, both, logit_scale=1.0)
    >>> decoupled, _ = weighted_softmax_loss(both, both, logit_scale=1.0, positive_coefficient=0.0)
    >>> round(float(plain), 4), round(float(decoupled), 4)
    (0.3133, -1.0)
  """
  pairwise.check(strategy, tile)
  if not 0 <= label_smoothing < 1:
    raise UserError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
  if positive_coefficient < 0:
    raise UserError(f"positive_coefficient={positive_coefficient} must be at least 0")
  if mean_negatives and negative_weight is not None:
    raise UserError("mean_negatives=True counts all negatives alike: leave it out, or leave out negative_weight")
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  keys = pairwise.keys_of(group, len(image), axes, present)
  positive = negatives.positive_similarities(image, text)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  of_images, of_texts = negatives.statistics_of_negatives(
    image,
    text,
    scale,
    positive,
    keys,
    sweep,
    with_totals=label_smoothing > 0 or mean_negatives,
    weight=negative_weight,
    image_side=image_side,
    text_side=text_side,
  )
  others = {"image_to_text": None, "text_to_image": None}
  if intra_modal:
    for direction, side in zip(others, (image, text), strict=True):
      # Both directions of a symmetric matrix are alike.
      others[direction], _ = negatives.statistics_of_negatives(
        side, side, scale, positive, keys, sweep, with_totals=mean_negatives
      )
  positive = positive * scale
  pairs = len(image) * pairwise.device_count(axes)

  def mean(values, weights=None):
    if present is not None:
      weights = present if weights is None else jnp.where(present, weights, 0)
    if weights is None:
      return pairwise.global_sum(jnp.sum(values), axes) / pairs
    weights = lax.stop_gradient(weights).astype(values.dtype)
    total = pairwise.global_sum(jnp.sum(weights), axes)
    return pairwise.global_sum(jnp.sum(weights * values), axes) / jnp.where(total > 0, total, 1)

  # The positive and the negatives come from different summations of the same products: what is nearer than their
  # rounding is a tie, and a tie is no hit.
  lengths = (jnp.linalg.norm(lax.stop_gradient(side).astype(scale.dtype), axis=1) for side in (image, text))
  tolerance = 4 * math.sqrt(image.shape[1]) * jnp.finfo(scale.dtype).eps * math.prod(lengths) * lax.stop_gradient(scale)

  metrics = {}
  directions = {"image_to_text": (of_images, image_extra), "text_to_image": (of_texts, text_extra)}
  for direction, (statistics, extra) in directions.items():
    largest, margin, count = statistics.largest, statistics.margin, statistics.count
    if (alike := others[direction]) is not None:
      margin = log_sum_exp(jnp.stack([margin, alike.margin], axis=1))
      count = count + alike.count if mean_negatives else None
    if mean_negatives:
      margin = margin - jnp.log(jnp.maximum(lax.stop_gradient(count), 1))
    if extra is not None:
      some = ~jnp.isneginf(extra)
      margins = jnp.where(some, extra, 0).astype(scale.dtype) * scale - positive[:, None]
      margins = jnp.where(some, margins, -jnp.inf)
      largest = jnp.maximum(largest, jnp.max(margins, axis=1, initial=-jnp.inf))
      margin = log_sum_exp(jnp.stack([margin, log_sum_exp(margins)], axis=1))
    loss = _cross_entropy(margin, positive_coefficient) + (1 - positive_weight) * positive
    if positive_coefficient == 0:
      loss = jnp.where(jnp.isneginf(margin), 0, loss)
    if label_smoothing:
      # How far the positive logit lies above the mean of all classes.
      loss = loss - label_smoothing * statistics.total / (statistics.count + 1)
    metrics[f"loss_{direction}"] = mean(loss, pair_weights)
    metrics[f"accuracy_{direction}"] = mean((largest < -tolerance).astype(scale.dtype))
  return (metrics["loss_image_to_text"] + metrics["loss_text_to_image"]) / 2, metrics


def _cross_entropy(margin: Float[Array, "pairs"], coefficient: float) -> Float[Array, "pairs"]:
  """Computes `log(a e^p + e^n) - p` of the margin n - p, accurately where it is small."""
  if coefficient > 0:
    return jnp.logaddexp(jnp.asarray(math.log(coefficient), margin.dtype), margin)
  return jnp.where(jnp.isneginf(margin), 0, margin)
