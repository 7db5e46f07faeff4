"""The softmax loss of volumes that the embeddings of several towers span (GRAM)."""

from collections.abc import Sequence

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

# The root has an infinite derivative at 0. This is small beside the square of a volume, and keeps it finite.
_LEAST = 1e-6


def gram_loss(
  views: Sequence[Float[Array, "pairs dim"]],
  *,
  logit_scale: Float[Array, ""] | float,
  label_smoothing: float = 0.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which minus a volume takes the place of a similarity.

  An anchor i and the other embeddings of an instance j span a parallelepiped. Its volume is 0 where two of them are
  equal or all lie in a plane, and 1 where all are orthogonal.

  Args:
    views: two or three L2-normalised embeddings of each instance, the anchors first; local shards inside
      `jax.shard_map`. Of two the volume is the sine between them, so that opposite ones count as equal.
    logit_scale: multiplier of the volumes, already exponentiated.
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    group: instances of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out
      of each other's negatives; None when all differ.
    axis_name: mesh axes that the instances are split over, None on one device.
    strategy: "gather" holds the other views of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The mean of both directions over the global batch and `{"volume"}`, the mean volume of an instance, equal on every
    device.

  Raises:
    UserError: for another number of views, an unknown strategy, a tile below 1 or a label smoothing outside [0, 1).

  Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment" (arXiv 2412.11959), without its matching
  head.

  Examples:
    >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> round(float(gram_loss([text, image], logit_scale=1 / 0.07)[0]), 4)
    0.0148
  """
  pairwise.check(strategy, tile)
  if len(views) not in (2, 3):
    raise UserError(f"a volume of {len(views)} embeddings is not known here: give two or three")
  if not 0 <= label_smoothing < 1:
    raise UserError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
  axes = pairwise.mesh_axes(axis_name)
  anchor, *others = views
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(*views))
  between = negatives.positive_similarities(*others) if len(others) == 2 else None
  own = volumes([negatives.positive_similarities(anchor, other) for other in others], between)
  totals = reduce_negatives(
    _matrices,
    (ROW_LOG_SUM_EXP, ROW_SUM, ROW_SUM, COLUMN_LOG_SUM_EXP, COLUMN_SUM, COLUMN_SUM),
    {"anchor": anchor, "own": own, "scale": to_rows(scale, anchor, axes)},
    {"others": others, "between": between, "own": own},
    pairwise.keys_of(group, len(anchor), axes),
    negatives.Sweep(axes, strategy, tile, ring_order),
  )
  pairs = len(anchor) * pairwise.device_count(axes)

  def mean(lines):
    return pairwise.global_sum(jnp.sum(lines), axes) / pairs

  lines = 0.0
  for margin, total, count in (totals[:3], totals[3:]):
    lines += jnp.logaddexp(0, margin) - label_smoothing * total / (count + 1)
  return mean(lines) / 2, {"volume": mean(own)}


def volumes(to_others: Sequence[Float[Array, "..."]], between: Float[Array, "..."] | None) -> Float[Array, "..."]:
  """Computes the volume that unit vectors span.

  Args:
    to_others: cosines of the anchor with each other vector, one or two.
    between: the cosine of the two others, None where there is one.

  Examples:
    >>> half = jnp.array(0.5)  # Angles of 60 degrees.
    >>> round(float(volumes([half, half], half)), 4)
    0.7071
  """
  determinant = 1 - sum(jnp.square(cosine) for cosine in to_others)
  if between is not None:
    first, second = to_others
    determinant += 2 * first * second * between - jnp.square(between)
  squared = jnp.maximum(determinant, 0)
  return squared * lax.rsqrt(squared + _LEAST)


def _matrices(rows, columns):
  cosines = [negatives.matmul(rows["anchor"], other, "id,jd->ij") for other in columns["others"]]
  between = None if columns["between"] is None else columns["between"][None, :]
  found = volumes(cosines, between)
  of_rows, of_columns = (
    (own - found) * rows["scale"][:, None] for own in (rows["own"][:, None], columns["own"][None, :])
  )
  return of_rows, of_rows, jnp.ones_like(found), of_columns, of_columns, jnp.ones_like(found)
