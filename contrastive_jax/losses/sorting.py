"""Contrastive learning by sorting (GroCo): a differentiable sorting network ranks the positive above hard negatives."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.nearest import over_nearest_negatives


def sorting_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  top_k: int = 10,
  steepness: float = 1.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Sorts each image's text among its nearest other texts, and likewise each text's image; the mean of both.

  An odd-even sorting network whose exchanges are gradual makes the probability of each element to land on each rank.
  The loss is the mean negative logarithm of the probability that the positive lands highest, and that each negative
  does not. What an anchor is sorted among is constant to the gradient: only anchors learn, and both sides are anchors.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    top_k: number of negatives in each group, at most all of them. Pairs that share a key are masked first.
    steepness: how abruptly the network exchanges two similarities; it takes the place of a logit scale.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device. The other side is gathered from all devices.
    tile: largest number of columns of similarities that exist at once; None is 512.
    ring_order: has no effect, and is accepted so that the losses are interchangeable.

  Returns:
    The loss of the global batch and `{"loss_image_to_text", "loss_text_to_image"}`, equal on every device. A pair
    without negatives counts 0.

  Raises:
    UserError: for a tile or `top_k` below 1 or a steepness that is not above 0.

  Shvetsova et al., "Learning by Sorting: Self-supervised Learning with Group Ordering Constraints" (arXiv 2301.02009),
  with texts in place of other views.

  Examples:
    >>> same = jnp.ones((2, 1))  # All similarities are equal: log 2.
    >>> round(float(sorting_loss(same, same, top_k=1)[0]), 4)
    0.6931
  """
  pairwise.check("gather", tile)
  if top_k < 1:
    raise UserError(f"top_k={top_k} must be at least 1")
  if not steepness > 0:
    raise UserError(f"steepness={steepness} must be above 0")
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  keys = pairwise.keys_of(group, len(image), axes)
  pairs = len(image) * pairwise.device_count(axes)
  size = min(top_k, max(pairs - 1, 1))

  def sorted_among(anchors, hardest, absent, positive):
    similarities = negatives.similarities_to(anchors, hardest)
    return _wrong_order(jnp.concatenate([similarities, positive[:, None]], axis=1), absent, steepness)

  def direction(anchors, others):
    anchors, others = anchors.astype(dtype), lax.stop_gradient(others.astype(dtype))
    positive = negatives.positive_similarities(anchors, others)
    lines = over_nearest_negatives(sorted_among, anchors, others, keys, size, positive, tile=tile, axes=axes)
    return pairwise.global_sum(jnp.sum(lines), axes) / pairs

  parts = {"loss_image_to_text": direction(image, text), "loss_text_to_image": direction(text, image)}
  return (parts["loss_image_to_text"] + parts["loss_text_to_image"]) / 2, parts


def _wrong_order(
  group: Float[Array, "pairs elements"], absent: Bool[Array, "pairs negatives"], steepness: float
) -> Float[Array, "pairs"]:
  """Mean negative log-probability that the elements land on their side; the positive is the last element."""
  size = group.shape[1]
  places = jnp.broadcast_to(jnp.eye(size, dtype=group.dtype), (len(group), size, size))  # Of each element and rank.
  for layer in range(size):
    low, high = slice(layer % 2, size - 1, 2), slice(layer % 2 + 1, size, 2)
    share = jnp.arctan(steepness * (group[:, high] - group[:, low])) / jnp.pi + 0.5
    # What is absent lies lowest, and stays there.
    share = jnp.where(absent[:, low], 1, share)
    group = _mix(group, low, high, share)
    places = _mix(places, low, high, share[:, None, :])
  right = jnp.concatenate([jnp.sum(places[:, :-1, :-1], axis=2), places[:, -1:, -1]], axis=1)
  missing = jnp.concatenate([absent, jnp.zeros_like(absent[:, :1])], axis=1)
  # A steep network rounds probabilities to 0.
  right = jnp.where(missing, 1, jnp.clip(right, jnp.finfo(group.dtype).tiny, 1))
  return -jnp.sum(jnp.log(right), axis=1) / jnp.sum(~missing, axis=1)


def _mix(values: Float[Array, "..."], low: slice, high: slice, share: Float[Array, "..."]) -> Float[Array, "..."]:
  first, second = values[..., low], values[..., high]
  values = values.at[..., low].set(share * first + (1 - share) * second)
  return values.at[..., high].set((1 - share) * first + share * second)
