"""A regulariser against pairs that lie far above their negatives, and negatives far below the nearest one (MCLRec)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.hard_negatives import least_similarities
from contrastive_jax.losses.lines import COLUMN_SUM, ROW_SUM, reduce_negatives


def margin_regularizer(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `max(p - n, 0) + mean_j (max(p, n) - n_j)`, the mean over pairs and both directions.

  p is the similarity of a pair, n_j those of its negatives and n the largest of them. It grows with the margin between
  the two, and with the distance of the negatives from whichever is larger. Gradients flow through n as well.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The value of the global batch, at least 0, and `{"margin_image_to_text", "margin_text_to_image"}`, the means of
    `p - n` over the pairs that have negatives; the others count 0 in the value. Negatives within rounding of the
    nearest one share its place. It takes five products of size pairs x pairs x dim.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  The contrastive regularisation of MCLRec (arXiv 2304.07763) as the authors' code has it, of similarities in place of
  its logits.

  Examples:
    >>> both = jnp.eye(2)
    >>> float(margin_regularizer(both, both)[0])  # A margin of 1, and negatives that lie 1 below the pair.
    2.0
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  keys = pairwise.keys_of(group, len(image), axes)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order)
  positive = negatives.positive_similarities(image, text)
  least = least_similarities(*lax.stop_gradient((image, text)), keys, 1, sweep)
  rows, columns = ({"of": side, "least": line} for side, line in zip((image, text), least, strict=True))
  sums = reduce_negatives(_parts, (ROW_SUM, COLUMN_SUM) * 4, rows, columns, keys, sweep)

  def mean(values: jax.Array, count: jax.Array | int) -> jax.Array:
    return pairwise.global_sum(jnp.sum(values), axes) / count

  pairs = len(image) * pairwise.device_count(axes)
  values, metrics = [], {}
  for which, direction in enumerate(("image_to_text", "text_to_image")):
    total, count, nearest, ties = sums[which::2]
    some = count > 0
    average, nearest = total / jnp.where(some, count, 1), nearest / jnp.where(some, ties, 1)
    margin = jnp.where(some, positive - nearest, 0)
    values.append(mean(jnp.where(some, jnp.maximum(margin, 0) + jnp.maximum(positive, nearest) - average, 0), pairs))
    having = jnp.maximum(mean(some.astype(margin.dtype), 1), 1)
    metrics[f"margin_{direction}"] = mean(margin, having)
  return sum(values) / 2, metrics


def _parts(rows: Any, columns: Any) -> tuple[Array, ...]:
  """Returns the similarities of a tile, ones, and both again where a negative is the nearest, for rows and columns."""
  similarities = negatives.matmul(rows["of"], columns["of"], "id,jd->ij")
  ones = jnp.ones_like(similarities)
  nearest = tuple(
    lax.stop_gradient(similarities >= line).astype(similarities.dtype)
    for line in (rows["least"][:, None], columns["least"][None, :])
  )
  return similarities, similarities, ones, ones, *(similarities * part for part in nearest), *nearest
