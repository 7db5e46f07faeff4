"""Clusters of the embeddings of a batch, and what a loss makes of them: weights of negatives, and proxies."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import log_sum_exp

# Rounds of k-means. Later ones move few embeddings, and weights need no optimum.
ROUNDS = 10


def spherical_k_means(
  embeddings: Float[Array, "pairs dim"],
  places: Int[Array, "pairs"],
  *,
  clusters: int,
  axis_name: str | tuple[str, ...] | None = None,
) -> Int[Array, "pairs"]:
  """Assigns each embedding to one of some clusters, by k-means with cosine similarities, as a constant to the gradient.

  Args:
    embeddings: L2-normalised embeddings; the local shard inside `jax.shard_map`.
    places: which cluster each embedding is the first centre of. One of `clusters` or more begins none.
    clusters: number of clusters.
    axis_name: mesh axes that the embeddings are split over, None on one device.

  Returns:
    The number of the cluster of each embedding. Devices exchange the centres in every round, and no embeddings. An
    embedding that lies within rounding of halfway between two centres may fall to either on another mesh.

  Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering" (Machine Learning 42, 2001).

  Examples:
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    >>> spherical_k_means(rows, jnp.arange(4), clusters=2).tolist()
    [0, 1, 1, 0]
  """
  dtype = negatives.accumulation_dtype(embeddings)
  rows = lax.stop_gradient(embeddings).astype(dtype)

  def centres_of(ids, before):
    sums = cluster_sums(rows, ids, clusters=clusters, axis_name=axis_name)
    length = jnp.linalg.norm(sums, axis=1, keepdims=True)
    # A cluster that has lost all its embeddings stays where it was.
    return jnp.where(length > 0, sums / jnp.where(length > 0, length, 1), before)

  def nearest(centres):
    return jnp.argmax(negatives.matmul(rows, centres, "id,kd->ik"), axis=1)

  first = centres_of(places, jnp.zeros((clusters, rows.shape[1]), dtype))
  return nearest(lax.fori_loop(0, ROUNDS, lambda _, centres: centres_of(nearest(centres), centres), first))


def cluster_sums(
  embeddings: Float[Array, "pairs dim"],
  ids: Int[Array, "pairs"],
  *,
  clusters: int,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "clusters dim"]:
  """Adds up the embeddings of each cluster over the whole mesh; those of no cluster are left out.

  Args:
    embeddings: the embeddings; the local shard inside `jax.shard_map`.
    ids: number of the cluster of each. One of `clusters` or more is none.
    clusters: number of clusters.
    axis_name: mesh axes that the embeddings are split over, None on one device.

  Examples:
    >>> cluster_sums(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([1, 1, 0]), clusters=3).tolist()
    [[4.0], [3.0], [0.0]]
  """
  dtype = negatives.accumulation_dtype(embeddings)
  members = jax.nn.one_hot(ids, clusters, dtype=dtype)
  sums = negatives.matmul(members, embeddings.astype(dtype), "ik,id->kd")
  return pairwise.global_sum(sums, pairwise.mesh_axes(axis_name))


def apart(
  image_side: tuple[Int[Array, "a"], ...], text_side: tuple[Int[Array, "b"], ...], logits: Float[Array, "a b"]
) -> tuple[Float[Array, "a b"], Float[Array, "a b"]]:
  """Computes the share of the clusterings in which two pairs lie in different clusters, as a `negatives.Weight`.

  Args:
    image_side: the cluster of each row's pair in every clustering.
    text_side: the cluster of each column's pair in every clustering.
    logits: the logits of the tile, which do not matter.

  Examples:
    >>> ids = jnp.array([0, 0, 1]), jnp.array([0, 1, 1])
    >>> apart(ids, ids, jnp.zeros((3, 3)))[0].tolist()
    [[0.0, 0.5, 1.0], [0.5, 0.0, 0.5], [1.0, 0.5, 0.0]]
  """
  differs = [row[:, None] != column[None, :] for row, column in zip(image_side, text_side, strict=True)]
  share = sum(part.astype(logits.dtype) for part in differs) / len(differs)
  return share, share


def cluster_proxy_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  ids: Int[Array, "pairs"],
  *,
  clusters: int,
  logit_scale: Float[Array, ""] | float,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-mean_i s_ii + mean_k log(1 + sum_{l != k} e^r_kl)`, in which r compares sums over clusters of pairs.

  r_kl is the scaled cosine of the sum of the images of cluster k and the sum of the texts of cluster l. The second mean
  is over the clusters that have a pair, and that of both directions. The loss has no lower bound in the logit scale:
  whoever learns the scale must not learn it from this loss, and nothing here stops its gradient.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    ids: number of the cluster of each pair, below `clusters`.
    clusters: number of clusters.
    logit_scale: multiplier of the similarities s and r, already exponentiated.
    axis_name: mesh axes that the pairs are split over, None on one device.

  Returns:
    The loss of the global batch and `{"clusters_used"}`, the number of clusters that have a pair. Devices exchange the
    sums, and no embeddings; each holds arrays of pairs x clusters and of clusters x clusters.

  PamC (arXiv 2209.14067), with the text of an image as its only neighbour, and the two towers as the two sides of the
  repulsion.

  Examples:
    >>> both = jnp.eye(2)
    >>> loss, _ = cluster_proxy_loss(both, both, jnp.arange(2), clusters=2, logit_scale=1.0)
    >>> round(float(loss), 4)  # log(1 + e^0) - 1
    -0.3069
  """
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  scale = jnp.asarray(logit_scale, dtype)
  pairs = len(image) * pairwise.device_count(axes)
  attraction = pairwise.global_sum(jnp.sum(negatives.positive_similarities(image, text)), axes) / pairs

  def proxies(rows):
    sums = cluster_sums(rows, ids, clusters=clusters, axis_name=axis_name)
    square = jnp.sum(jnp.square(sums), axis=1, keepdims=True)
    # The sum of no embeddings has no direction.
    return sums * lax.rsqrt(jnp.where(square > 0, square, 1))

  used = cluster_sums(jnp.ones((len(image), 1), dtype), ids, clusters=clusters, axis_name=axis_name)[:, 0] > 0
  others = used[:, None] & used[None, :] & ~jnp.eye(clusters, dtype=bool)
  logits = jnp.where(others, negatives.matmul(proxies(image), proxies(text), "kd,ld->kl") * scale, -jnp.inf)
  count = jnp.sum(used, dtype=dtype)
  repulsion = sum(
    jnp.sum(jnp.where(used, jnp.logaddexp(0, log_sum_exp(matrix)), 0)) / count for matrix in (logits, logits.T)
  )
  return repulsion / 2 - scale * attraction, {"clusters_used": count}
