"""Barlow Twins between two towers: features of a pair correlate with themselves and with no other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.losses import negatives, pairwise

# Added to the variance of a feature, which is about 1 / dim: one that has collapsed must not be divided by 0.
EPSILON = 1e-6


def cross_correlation_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  off_diagonal: float = 0.005,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `sum_k (1 - C_kk)^2 + off_diagonal sum_(k != l) C_kl^2` of the correlations C of image and text features.

  Args:
    image: image embeddings; the local shard inside `jax.shard_map`.
    text: text embeddings of the same pairs.
    off_diagonal: weight of the correlations between different features.
    axis_name: mesh axes that the pairs are split over, None on one device.

  Returns:
    The value of the global batch, 0 where C is the identity, and `{"feature_agreement"}`, the mean of C_kk. Devices
    exchange one matrix `[dim, dim]` whatever the batch.

  Zbontar et al., "Barlow Twins" (arXiv 2103.03230), equation 1, with an image and its text as the two views: BarLIP of
  "Improved baselines for vision-language pre-training" (arXiv 2305.08675), without its projection heads.

  Examples:
    >>> both = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> [round(float(cross_correlation_loss(both, text)[0]), 3) for text in (both, both[:, ::-1])]
    [0.0, 2.01]
  """
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  pairs = len(image) * pairwise.device_count(axes)

  image, text = (standardized(side.astype(dtype), axes) for side in (image, text))
  correlations = pairwise.global_sum(negatives.matmul(image, text, "ik,il->kl"), axes) / pairs
  agreement = jnp.diagonal(correlations)
  # Not the sum of all squares less that of the diagonal, which loses the digits of what is small.
  others = jnp.sum(jnp.where(jnp.eye(len(agreement), dtype=bool), 0, jnp.square(correlations)))
  loss = jnp.sum(jnp.square(1 - agreement)) + off_diagonal * others
  return loss, {"feature_agreement": jnp.mean(agreement)}


def standardized(features: Float[Array, "pairs dim"], axes: tuple[str, ...]) -> Float[Array, "pairs dim"]:
  """Returns features with a mean of 0 and a variance of 1 over the whole batch, each by itself.

  Args:
    features: the features of this device's pairs.
    axes: mesh axes that the pairs are split over.

  Examples:
    >>> standardized(jnp.array([[1.0], [5.0]]), ()).round(3).tolist()
    [[-1.0], [1.0]]
  """
  pairs = len(features) * pairwise.device_count(axes)

  def mean(values: jax.Array) -> jax.Array:
    return pairwise.global_sum(jnp.sum(values, axis=0), axes) / pairs

  centred = features - mean(features)
  return centred * lax.rsqrt(mean(jnp.square(centred)) + EPSILON)
