"""Clusters of the pairs of a batch, by k-means of one tower's embeddings, for terms that take them from each batch."""

import jax
from jaxtyping import Array, Int

from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.clusters import spherical_k_means
from contrastive_jax.objectives import draws
from contrastive_jax.objectives.term import Pairs, Sizes


def of_pairs(
  pairs: Pairs, tower: str, counts: tuple[int, ...], axes: tuple[str, ...]
) -> tuple[Int[Array, "pairs"], ...]:
  """Returns the cluster of each of this device's pairs, for each number of clusters.

  The first centres are drawn from the keys of the batch, on every mesh alike. A batch with fewer pairs than clusters
  has a cluster for each pair.

  Args:
    pairs: the local shard inside `jax.shard_map`, or all pairs outside.
    tower: the name of the tower whose embeddings are clustered.
    counts: the numbers of clusters.
    axes: mesh axes that the pairs are split over.
  """
  embeddings, key = pairs.of(tower), draws.batch_key(pairs, axes)
  everyone = len(embeddings) * pairwise.device_count(axes)
  found = []
  for run, clusters in enumerate(counts):
    places = draws.of_pairs(
      lambda count, run=run: jax.random.permutation(jax.random.fold_in(key, run), count), pairs, axes
    )
    found.append(spherical_k_means(embeddings, places, clusters=min(clusters, everyone), axis_name=axes or None))
  return tuple(found)


def check(counts: tuple[int, ...], sizes: Sizes, option: str) -> None:
  """Raises a `UserError` where a batch has fewer pairs than there are to be clusters.

  Args:
    counts: the numbers of clusters.
    sizes: the sizes of the run.
    option: name of the option that has these numbers, for the error.
  """
  most = max(counts, default=0)
  if sizes.pairs and most > sizes.pairs:
    raise UserError(f"{option} asks for {most} clusters of a batch of {sizes.pairs} pairs: lower it")
