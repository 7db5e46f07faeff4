"""A softmax loss in which every image and every text has a temperature of its own, found by robust optimisation."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import safe_log

# Largest derivative by a temperature that enters its momentum.
_LARGEST_SLOPE = 5.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
  """The state of each sample of one modality.

  Attributes:
    log_mean: logarithm of the running mean of `exp(h / temperature)` over negatives, where h is a negative's similarity
      minus that of the positive; without meaning before the first visit.
    temperature: divisor of the sample's similarities.
    momentum: running mean of the derivative by the temperature.
  """

  log_mean: Float[Array, "samples"]
  temperature: Float[Array, "samples"]
  momentum: Float[Array, "samples"]


def individual_temperature_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  images: Samples,
  texts: Samples,
  seen: Int[Array, "pairs"],
  *,
  gamma: Float[Array, ""] | float = 0.8,
  rho: float = 6.0,
  rate: float = 0.03,
  momentum: float = 0.9,
  smallest: float = 0.005,
  largest: float = 1.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], tuple[Samples, Samples], dict[str, Float[Array, ""]]]:
  """Computes `mean_i t_i log E_j exp(h_ij / t_i) + t_i rho`, summed over both directions, with means over all steps.

  The gradient of the embeddings is that of a batch whose means of exponentials are the running ones, which takes the
  bias of a small batch away. No gradient reaches the samples; what they become is returned.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    images: the state of the images of these pairs.
    texts: the state of their texts.
    seen: how many steps have shown the pair before; at its first the running means are those of the batch.
    gamma: weight of the batch in the running means, in (0, 1].
    rho: weight of the temperatures; the larger it is, the smaller they become.
    rate: learning rate of the temperatures.
    momentum: weight of the newest derivative in its running mean, in (0, 1].
    smallest: the smallest temperature.
    largest: the largest temperature.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The loss of the global batch, what is to be remembered of the images and of the texts of these pairs, and
    `{"temperature_image", "temperature_text"}`, the mean temperatures of the global batch before the step. A pair
    without negatives counts 0 and is remembered as it was. Eight matrix products of size pairs x pairs x dim.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
  Individualization" (arXiv 2305.11965), algorithm 1, with two differences: the means are kept as logarithms, so that
  no running maximum is needed, and the first visit of a sample takes the batch's mean.
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  keys = pairwise.keys_of(group, len(image), axes)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  one = jnp.ones((), dtype)
  pairs = len(image) * pairwise.device_count(axes)
  # Of a gamma of 1 nothing old remains: its logarithm is minus infinity.
  log_old, log_new = (safe_log(jnp.asarray(share, dtype)) for share in (1 - gamma, gamma))

  def direction(anchors, others, samples: Samples) -> tuple[Float[Array, ""], Samples, Float[Array, ""]]:
    temperature = samples.temperature
    rows = anchors.astype(dtype) / temperature[:, None]
    positive = negatives.positive_similarities(rows, others)
    statistics, _ = negatives.statistics_of_negatives(rows, others, one, positive, keys, sweep, with_totals=True)
    margin, count = statistics.margin, lax.stop_gradient(statistics.count)
    some = count > 0
    margin = jnp.where(some, margin, 0)
    expected = _expected_margin(*lax.stop_gradient((rows, others, positive, margin)), temperature, keys, sweep)

    # From here on nothing is differentiated, but `margin` in the last line.
    log_batch = lax.stop_gradient(margin) - jnp.log(jnp.maximum(count, 1))
    running = jnp.logaddexp(log_old + samples.log_mean, log_new + log_batch)
    log_mean = jnp.where(seen > 0, running, log_batch)
    share = jnp.exp(log_batch - log_mean)
    slope = log_mean + rho - share * expected
    change = (1 - momentum) * samples.momentum + momentum * jnp.clip(slope, -_LARGEST_SLOPE, _LARGEST_SLOPE)
    after = Samples(log_mean, jnp.clip(temperature - rate * change, smallest, largest), change)
    after = jax.tree.map(lambda new, old: jnp.where(some, new, old), after, samples)

    value = jnp.where(some, temperature * (log_mean + rho), 0)
    surrogate = jnp.where(some, share * temperature * margin, 0)
    return jnp.sum(lax.stop_gradient(value - surrogate) + surrogate), after, jnp.sum(temperature)

  images, texts = (jax.tree.map(lambda leaf: lax.stop_gradient(leaf).astype(dtype), side) for side in (images, texts))
  image_loss, images, image_temperature = direction(image, text, images)
  text_loss, texts, text_temperature = direction(text, image, texts)
  sums = (image_loss + text_loss, image_temperature, text_temperature)
  loss, image_temperature, text_temperature = (pairwise.global_sum(total, axes) / pairs for total in sums)
  return loss, (images, texts), {"temperature_image": image_temperature, "temperature_text": text_temperature}


def _expected_margin(rows, others, positive, margin, temperature, keys, sweep) -> Float[Array, "pairs"]:
  """Averages h / t over the negatives of each row, weighted by the softmax over them."""
  # A cosine is at most 1, so that 1 / t bounds all logits of a row: what they lack to it is a weight that is not
  # negative. The bound lies a little higher, for cosines that were rounded up.
  bound = (1 + 1e-3) / temperature

  def lack(bounds, _, logits):
    return jnp.maximum(bounds[:, None] - logits, 0), jnp.ones_like(logits)

  one = jnp.ones((), rows.dtype)
  statistics, _ = negatives.statistics_of_negatives(
    rows, others, one, positive, keys, sweep, weight=lack, image_side=bound, text_side=bound
  )
  return bound - positive - jnp.exp(statistics.margin - margin)
