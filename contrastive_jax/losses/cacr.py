"""Contrastive attraction and repulsion (CACR): distances to positives and negatives, weighted by how hard they are."""

import itertools

import jax
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
from contrastive_jax.losses.negatives import matmul
from contrastive_jax.losses.reductions import finite


def attraction_repulsion_loss(
  views: pairwise.Views,
  *,
  attraction_scale: float = 1.0,
  repulsion_scale: float = 1.0,
  attraction_weight: float = 1.0,
  repulsion_weight: float = 1.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the squared distances to other views of an instance minus those to views of others, both weighted.

  Far positives and near negatives weigh more: the weights are the softmax of the distance times `attraction_scale`
  over the other views of the instance, and of minus the distance times `repulsion_scale` over the negatives. Gradients
  flow through them. The repulsion is the mean over all two views and both directions.

  Args:
    views: L2-normalised embeddings of each view of the same instances; local shards inside `jax.shard_map`.
    attraction_scale: how sharply far positives are preferred; 0 weighs all alike, and of two views it has no effect.
    repulsion_scale: how sharply near negatives are preferred; 0 weighs all alike.
    attraction_weight: weight of the distances to positives.
    repulsion_weight: weight of the distances to negatives.
    group: instances of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out
      of each other's negatives; None when all differ.
    axis_name: mesh axes that the instances are split over, None on one device.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch and `{"attraction", "repulsion"}`, its two parts without their weights, equal on every
    device. An instance without negatives has a repulsion of 0. Two sweeps for each two views.

  Raises:
    UserError: for fewer than two views, an unknown strategy or a tile below 1.

  Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning" (arXiv 2105.03746), with
  the costs of the authors' code for small sets.

  Examples:
    >>> both = jnp.eye(2)
    >>> loss, parts = attraction_repulsion_loss([both, both])
    >>> float(loss), float(parts["attraction"]), float(parts["repulsion"])
    (-2.0, 0.0, -2.0)
  """
  pairwise.check_views(views, strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(*views)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  keys = pairwise.keys_of(group, len(views[0]), axes)
  pairs = len(views[0]) * pairwise.device_count(axes)

  def mean(lines):
    return pairwise.global_sum(jnp.sum(lines), axes) / pairs

  others = [[_distances(view, other) for j, other in enumerate(views) if j != i] for i, view in enumerate(views)]
  pulled = [_expectation(jnp.stack(distances, axis=1), attraction_scale) for distances in others]
  attraction = mean(sum(pulled)) / len(views)
  scale = jnp.asarray(repulsion_scale, dtype)
  pushed = [line for two in itertools.combinations(views, 2) for line in _expected_distances(*two, scale, keys, sweep)]
  repulsion = -mean(sum(pushed)) / len(pushed)
  loss = attraction_weight * attraction + repulsion_weight * repulsion
  return loss, {"attraction": attraction, "repulsion": repulsion}


def reweighted_softmax_loss(
  views: pairwise.Views,
  *,
  temperature: float = 1.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes softmax losses of the first view with each other one, weighted by how far the two lie apart.

  The weights of an instance are the softmax of the squared distances divided by the temperature, over the other views,
  and constants to the gradient. Of two views it is `2 temperature softmax_loss`.

  Args:
    views: L2-normalised embeddings of each view of the same instances; local shards inside `jax.shard_map`.
    temperature: divisor of similarities and distances.
    group: instances of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out
      of each other's negatives; None when all differ.
    axis_name: mesh axes that the instances are split over, None on one device.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch and no metrics. One sweep for each view but the first.

  Raises:
    UserError: for fewer than two views, an unknown strategy, a tile below 1 or a temperature that is not above 0.

  Zheng et al. (arXiv 2105.03746), the RBF cost of the authors' code for ImageNet, as the mean of both directions.

  Examples:
    >>> both = jnp.eye(2)
    >>> round(float(reweighted_softmax_loss([both, both], temperature=0.5)[0]), 4)  # log(1 + e^-2)
    0.1269
  """
  pairwise.check_views(views, strategy, tile)
  if not temperature > 0:
    raise UserError(f"temperature={temperature} must be above 0")
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(1 / temperature, negatives.accumulation_dtype(*views))
  keys = pairwise.keys_of(group, len(views[0]), axes)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  first, *others = views
  distances = jnp.stack([_distances(first, other) for other in others], axis=1)
  weights = jax.nn.softmax(lax.stop_gradient(distances) * scale, axis=1)
  total = 0.0
  for index, other in enumerate(others):
    own = negatives.positive_similarities(other, first)
    both = negatives.statistics_of_negatives(other, first, scale, own, keys, sweep)
    total += weights[:, index] * sum(jnp.logaddexp(0, statistics.margin) for statistics in both)
  pairs = len(first) * pairwise.device_count(axes)
  return temperature * pairwise.global_sum(jnp.sum(total), axes) / pairs, {}


def _distances(first: Float[Array, "pairs dim"], second: Float[Array, "pairs dim"]) -> Float[Array, "pairs"]:
  """Squared distances of unit vectors."""
  return 2 - 2 * negatives.positive_similarities(first, second)


def _expectation(distances: Float[Array, "pairs views"], scale: float) -> Float[Array, "pairs"]:
  return jnp.sum(jax.nn.softmax(distances * scale, axis=1) * distances, axis=1)


def _expected_distances(first, second, scale, keys, sweep) -> tuple[Float[Array, "pairs"], Float[Array, "pairs"]]:
  """Mean squared distance to the negatives, weighted by the softmax of minus the distances, of both views."""
  rows = {"view": first, "scale": to_rows(2 * scale, first, sweep.axes)}
  columns = {"view": second}
  totals = reduce_negatives(_logits, (ROW_LOG_SUM_EXP, COLUMN_LOG_SUM_EXP), rows, columns, keys, sweep)
  rows["total"], columns["total"] = map(finite, totals)
  return reduce_negatives(_weighted_distances, (ROW_SUM, COLUMN_SUM), rows, columns, keys, sweep)


def _logits(rows, columns):
  similarities = matmul(rows["view"], columns["view"], "id,jd->ij")
  logits = (similarities - 1) * rows["scale"][:, None]
  return logits, logits


def _weighted_distances(rows, columns):
  similarities = matmul(rows["view"], columns["view"], "id,jd->ij")
  logits, distances = (similarities - 1) * rows["scale"][:, None], 2 - 2 * similarities
  # A share is at most 1. What is masked may be more, and its derivative must not become infinite.
  return tuple(
    jnp.exp(jnp.minimum(logits - total, 1)) * distances for total in (rows["total"][:, None], columns["total"][None, :])
  )
