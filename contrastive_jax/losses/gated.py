"""The softmax loss of pairs of instances that have nothing to do with each other, in features that gates choose."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.lines import ROW_LOG_SUM_EXP, reduce_negatives, to_rows
from contrastive_jax.losses.reductions import gathered

# The least squared length of a gated embedding.
_LEAST = 1e-12


def gated_pairs_loss(
  embeddings: Float[Array, "pairs dim"],
  gates: Float[Array, "pairs dim"],
  partners: Int[Array, "pairs"],
  *,
  logit_scale: Float[Array, ""] | float,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-mean_i log(e^c_ip / (e^c_ip + sum_j e^c_ij))`, c_ij the scaled cosine of `g_i x_i` and `g_i x_j`.

  p is the partner of i, and j runs over the others that share a key with neither. Features are multiplied by the gates
  of i on both sides, so that each i is compared in features of its own.

  Args:
    embeddings: L2-normalised embeddings x of one tower; the local shard inside `jax.shard_map`.
    gates: the factors g of the features of each pair, at least 0.
    partners: number of the partner of each pair, counted over all devices.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device. Partners are looked up in what is gathered
      from all devices.
    strategy: "gather" holds the embeddings of all devices for the negatives, too, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch and no metrics. Pairs that share a key with their partner are left out of the mean. It
    takes eight products of size pairs x pairs x dim.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  SimLAP of "Rethinking Positive Pairs in Contrastive Learning" (arXiv 2410.18200), with one positive.

  Examples:
    >>> rows = jnp.array([[0.6, 0.8, 0.0], [0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    >>> first, every = jnp.array([[1.0, 0.0, 0.0]] * 3), jnp.ones((3, 3))
    >>> partners, options = jnp.array([1, 0, 2]), {"logit_scale": 1.0}  # The third has itself, and does not count.
    >>> [round(float(gated_pairs_loss(rows, gates, partners, **options)[0]), 4) for gates in (first, every)]
    [0.3133, 0.7332]
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(embeddings, gates)
  scale = jnp.asarray(logit_scale, dtype)
  keys = pairwise.keys_of(group, len(embeddings), axes)
  everyone = gathered({"embeddings": embeddings, "keys": keys}, axes)
  partner = jax.tree.map(lambda leaf: leaf[partners], everyone)
  # The cosine of two gated embeddings is a product with one of them over the root of another with its squares.
  rows, gates = embeddings.astype(dtype), gates.astype(dtype)
  squares = jnp.square(gates)
  length = jnp.sum(squares * jnp.square(rows), axis=1, keepdims=True)
  gated = squares * rows * lax.rsqrt(jnp.maximum(length, _LEAST))
  other = partner["embeddings"].astype(dtype)
  positive = _cosine(jnp.sum(gated * other, axis=1), jnp.sum(squares * jnp.square(other), axis=1))
  (margin,) = reduce_negatives(
    _margins,
    (ROW_LOG_SUM_EXP,),
    {"gated": gated, "squares": squares, "positive": positive, "scale": to_rows(scale, embeddings, axes)},
    embeddings,
    keys.and_those(partner["keys"]),
    negatives.Sweep(axes, strategy, tile, ring_order),
    column_keys=keys.and_those(keys),
  )
  counts = ~pairwise.share_a_key(keys, partner["keys"])
  total = pairwise.global_sum(jnp.sum(jnp.where(counts, jnp.logaddexp(0, margin), 0)), axes)
  return total / jnp.maximum(pairwise.global_sum(jnp.sum(counts, dtype=dtype), axes), 1), {}


def _cosine(product: Float[Array, "..."], squared_length: Float[Array, "..."]) -> Float[Array, "..."]:
  return product * lax.rsqrt(jnp.maximum(squared_length, _LEAST))


def _margins(rows: Any, columns: Any) -> tuple[Float[Array, "a b"]]:
  """Returns the logits of a tile relative to that of each row's partner."""
  products = negatives.matmul(rows["gated"], columns, "id,jd->ij")
  lengths = negatives.matmul(rows["squares"], jnp.square(columns), "id,jd->ij")
  return ((_cosine(products, lengths) - rows["positive"][:, None]) * rows["scale"][:, None],)
