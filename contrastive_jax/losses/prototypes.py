"""Swapped prediction: the cluster that a pair's text is assigned to is predicted from its image, and the other way."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import finite, safe_log


class Earlier(NamedTuple):
  """Embeddings of earlier pairs, of which each device holds a part.

  Attributes:
    image: the images.
    text: the texts.
    valid: which rows hold a pair already.
  """

  image: Float[Array, "rows dim"]
  text: Float[Array, "rows dim"]
  valid: Bool[Array, "rows"]


def swapped_prototypes_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  prototypes: Float[Array, "prototypes dim"],
  *,
  temperature: float = 0.1,
  code_temperature: float = 0.05,
  iterations: int = 3,
  earlier: Earlier | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the cross-entropy of each tower's prototype probabilities with the other tower's codes, on average.

  Codes are the similarities to the prototypes, balanced by `sinkhorn` so that all prototypes are used equally. They are
  constants to the gradient.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    prototypes: vectors that both towers share, which are normalised here.
    temperature: divisor of the similarities whose softmax is the probabilities.
    code_temperature: divisor of the similarities whose balanced exponentials are the codes; the smaller, the harder.
    iterations: number of rounds of the balancing.
    earlier: embeddings of earlier pairs, which take part in the balancing alone: a small batch cannot use many
      prototypes equally.
    axis_name: mesh axes that the pairs are split over, None on one device.

  Returns:
    The loss of the global batch, `log(prototypes)` where all embeddings are equally near to all prototypes, and
    `{"prototypes_used"}`, the exponential of the entropy of the images' mean probabilities. Devices exchange two
    vectors of the number of prototypes in each round, and no embeddings.

  Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (arXiv 2006.09882),
  equations 2 to 5, with the two towers as the two views.

  Examples:
    >>> both, prototypes = jnp.eye(2), jnp.eye(2)
    >>> [round(float(swapped_prototypes_loss(both, text, prototypes)[0]), 4) for text in (both, both[::-1])]
    [0.0, 10.0]
  """
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  directions = prototypes.astype(dtype)
  directions = directions / jnp.maximum(jnp.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
  pairs = len(image) * pairwise.device_count(axes)

  def mean(local: jax.Array) -> jax.Array:
    return pairwise.global_sum(local, axes) / pairs

  def scores(embeddings: jax.Array) -> jax.Array:
    return negatives.matmul(embeddings.astype(dtype), directions, "id,kd->ik")

  def codes(own: jax.Array, before: jax.Array | None) -> jax.Array:
    rows = lax.stop_gradient(own)
    if before is not None:
      past = jnp.where(earlier.valid[:, None], lax.stop_gradient(scores(before)), -jnp.inf)
      rows = jnp.concatenate([rows, past])
    return sinkhorn(rows / code_temperature, iterations=iterations, axis_name=axis_name)[: len(own)]

  sides = scores(image), scores(text)
  before = (None, None) if earlier is None else (earlier.image, earlier.text)
  targets = [codes(own, past) for own, past in zip(sides, before, strict=True)]
  log_probabilities = [jax.nn.log_softmax(side / temperature, axis=1) for side in sides]
  swapped = zip(targets[::-1], log_probabilities, strict=True)
  loss = mean(-sum(jnp.sum(target * predicted) for target, predicted in swapped)) / 2
  share = mean(jnp.sum(jnp.exp(lax.stop_gradient(log_probabilities[0])), axis=0))
  return loss, {"prototypes_used": jnp.exp(-jnp.sum(share * jnp.where(share > 0, safe_log(share), 0)))}


def sinkhorn(
  logits: Float[Array, "rows prototypes"], *, iterations: int = 3, axis_name: str | tuple[str, ...] | None = None
) -> Float[Array, "rows prototypes"]:
  """Scales the exponentials of logits so that each row sums to 1 and all columns sum to nearly the same.

  It works on logarithms, in which no exponential overflows and no sum is 0. The result is a constant to the gradient.

  Args:
    logits: the logits of this device's rows. A row of minus infinity takes no part and stays 0.
    iterations: number of rounds, at least 1. Each scales the columns over the whole mesh and then the rows.
    axis_name: mesh axes that the rows are split over, None on one device.

  Examples:
    >>> balanced = sinkhorn(jnp.array([[0.0, -20.0], [0.0, -10.0]]), iterations=100)
    >>> [[round(float(share), 2) for share in row] for row in balanced]
    [[0.99, 0.01], [0.01, 0.99]]
  """
  axes = pairwise.mesh_axes(axis_name)
  logits = lax.stop_gradient(logits)
  some = jnp.max(logits, axis=1, keepdims=True) > -jnp.inf
  filled, of_rows = jnp.where(some, logits, 0), jnp.zeros_like(logits[:, :1])
  for _ in range(iterations):
    of_columns = -_log_sum_exp_over_mesh(logits + of_rows, axes)
    of_rows = -jax.nn.logsumexp(filled + of_columns, axis=1, keepdims=True)
  # Rows sum to 1 to rounding this way, however large the logits are.
  return jnp.where(some, jax.nn.softmax(filled + of_columns, axis=1), 0)


def _log_sum_exp_over_mesh(logits: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Computes the log-sum-exp of each column over the rows of all devices."""
  largest = jnp.max(logits, axis=0)
  largest = finite(lax.pmax(largest, axes) if axes else largest)
  total = jnp.sum(jnp.exp(logits - largest), axis=0)
  return jnp.log(pairwise.global_sum(total, axes)) + largest
