"""The sigmoid loss: every pair of the batch is its own binary classification."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses import negatives, pairwise


def sigmoid_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  logit_bias: Float[Array, ""] | float | None,
  present: Bool[Array, "pairs"] | None = None,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-sum_ij log sigmoid(y_ij (logit_scale s_ij + logit_bias)) / pairs`, `y` 1 on the diagonal, else -1.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    logit_bias: added to the logits; None for none.
    present: which pairs there are: the value and all gradients are those of a batch without the others. None is all.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The loss of the global batch and `{"loss_positive", "loss_negative"}`, its two parts; equal on every device.
    Gradients taken outside `jax.shard_map` are exact on any mesh.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), algorithm 1.

  Examples:
    >>> image, text = jnp.eye(2), jnp.eye(2)
    >>> loss, parts = sigmoid_loss(image, text, logit_scale=10.0, logit_bias=-5.0)
    >>> [round(float(value), 4) for value in (loss, parts["loss_positive"], parts["loss_negative"])]
    [0.0134, 0.0067, 0.0067]
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  scale = jnp.asarray(logit_scale, dtype)
  bias = jnp.asarray(0.0 if logit_bias is None else logit_bias, dtype)
  keys = pairwise.keys_of(group, len(image), axes, present)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  negative = negatives.sum_over_negatives(_softplus_and_sigmoid, image, text, scale, bias, keys, sweep)
  positive = jax.nn.softplus(-(negatives.positive_similarities(image, text) * scale + bias))
  pairs = len(image) * pairwise.device_count(axes)
  if present is not None:
    positive = jnp.where(present, positive, 0)
    pairs = jnp.maximum(pairwise.global_sum(jnp.sum(present.astype(dtype)), axes), 1)
  positive = jnp.sum(positive)
  parts = {"loss_positive": positive, "loss_negative": negative}
  parts = {name: pairwise.global_sum(part, axes) / pairs for name, part in parts.items()}
  return parts["loss_positive"] + parts["loss_negative"], parts


def balanced_bias(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  present: Bool[Array, "pairs"] | None = None,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> Float[Array, ""]:
  """Finds the bias at which as many pairs are expected to match as do, where the sigmoid loss is smallest in it.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    logit_scale: multiplier of the similarities, already exponentiated.
    present: which pairs there are, as in `sigmoid_loss`; at least one.
    group: as in `sigmoid_loss`.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The bias, equal on every device, after 40 bisections, each as dear as the loss without its gradient.

  Examples:
    >>> round(float(balanced_bias(jnp.zeros((8, 2)), jnp.zeros((8, 2)), logit_scale=10.0)), 4)  # log(1 / 7)
    -1.9459
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  keys = pairwise.keys_of(group, len(image), axes, present)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  positive = negatives.positive_similarities(image, text) * scale

  def halve(_, bounds):
    low, high = bounds
    bias = (low + high) / 2
    wrong = negatives.sum_over_negatives(_sigmoid_alone, image, text, scale, bias, keys, sweep)
    missed = jnp.sum(jax.nn.sigmoid(-(positive + bias)), where=present)
    above = pairwise.global_sum(wrong - missed, axes) > 0
    return jnp.where(above, low, bias), jnp.where(above, bias, high)

  pairs = len(image) * pairwise.device_count(axes)
  low, high = lax.fori_loop(0, 40, halve, (-scale - math.log(pairs) - 1, scale + 1))
  return (low + high) / 2


def _sigmoid_alone(logits: Float[Array, "a b"]) -> tuple[Float[Array, "a b"], Float[Array, "a b"]]:
  """Computes the sigmoid, of which no derivative is asked."""
  value = jax.nn.sigmoid(logits)
  return value, value


def _softplus_and_sigmoid(logits: Float[Array, "a b"]) -> tuple[Float[Array, "a b"], Float[Array, "a b"]]:
  """Computes log(1 + e^x) and its derivative from one exponential that cannot overflow."""
  # Not `abs`, whose derivative at 0 is 0: that of the sigmoid there is 1/4.
  small = jnp.exp(jnp.where(logits >= 0, -logits, logits))
  sigmoid = jnp.where(logits >= 0, 1, small) / (1 + small)
  return jnp.maximum(logits, 0) + jnp.log1p(small), sigmoid
