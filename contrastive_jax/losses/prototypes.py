"""Swapped prediction: the cluster that a pair's text is assigned to is predicted from its image, and the other way."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.blocks import map_blocks
from contrastive_jax.losses.reductions import finite, safe_log

# Rows whose similarities to the prototypes exist at once.
_ROWS = 512


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

  Codes are the softmax of the similarities to the prototypes, balanced by `balancing_scales` so that all prototypes are
  used equally. They are constants to the gradient.

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

  def scores(rows: jax.Array) -> jax.Array:
    return negatives.matmul(rows.astype(dtype), directions, "id,kd->ik")

  def scales(rows: jax.Array, before: jax.Array | None) -> jax.Array:
    valid = jnp.ones(len(rows), bool)
    if before is not None:
      rows, valid = jnp.concatenate([rows, before.astype(rows.dtype)]), jnp.concatenate([valid, earlier.valid])
    balanced = functools.partial(balancing_scales, iterations=iterations, axis_name=axis_name)
    return balanced(lambda some: scores(some) / code_temperature, lax.stop_gradient(rows), valid)

  before = (None, None) if earlier is None else (earlier.image, earlier.text)
  of_images, of_texts = (scales(rows, past) for rows, past in zip((image, text), before, strict=True))

  @jax.checkpoint
  def of_block(rows, fresh):
    sides = [scores(side) for side in rows]
    codes = [
      jax.nn.softmax(lax.stop_gradient(side) / code_temperature + scale, axis=1)
      for side, scale in zip(sides, (of_images, of_texts), strict=True)
    ]
    predicted = [jax.nn.log_softmax(side / temperature, axis=1) for side in sides]
    lines = -sum(jnp.sum(code * swapped, axis=1) for code, swapped in zip(codes, predicted[::-1], strict=True))
    probabilities = jnp.exp(lax.stop_gradient(predicted[0]))
    return jnp.sum(jnp.where(fresh, lines, 0)), jnp.sum(jnp.where(fresh[:, None], probabilities, 0), axis=0)

  sums = map_blocks(of_block, (image, text), _ROWS)
  total, share = (pairwise.global_sum(jnp.sum(blocks, axis=0), axes) / pairs for blocks in sums)
  return total / 2, {"prototypes_used": jnp.exp(-jnp.sum(share * jnp.where(share > 0, safe_log(share), 0)))}


def balancing_scales(
  logits: Callable[[Float[Array, "some dim"]], Float[Array, "some prototypes"]],
  rows: Float[Array, "rows dim"],
  valid: Bool[Array, "rows"],
  *,
  iterations: int = 3,
  axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "prototypes"]:
  """Returns what to add to logits so that the softmax of each row uses all columns nearly equally.

  These are Sinkhorn's rounds, each of which scales the columns over the whole mesh and then the rows. They work on
  logarithms, in which no exponential overflows and no sum is 0, and see some hundred rows of logits at a time.

  Args:
    logits: a function that makes the logits of some rows.
    rows: this device's rows, without a gradient.
    valid: which of them take part.
    iterations: number of rounds, at least 1.
    axis_name: mesh axes that the rows are split over, None on one device.

  Examples:
    >>> logits = jnp.array([[0.0, -20.0], [0.0, -10.0]])
    >>> scales = balancing_scales(lambda some: some, logits, jnp.ones(2, bool), iterations=100)
    >>> [[round(float(share), 2) for share in row] for row in jax.nn.softmax(logits + scales, axis=1)]
    [[0.99, 0.01], [0.01, 0.99]]
  """
  axes = pairwise.mesh_axes(axis_name)

  def of_block(block, fresh, *, scales):
    rows, valid = block
    own = lax.stop_gradient(logits(rows))
    if scales is not None:
      own = own - jax.nn.logsumexp(own + scales, axis=1, keepdims=True)
    return jax.nn.logsumexp(jnp.where((valid & fresh)[:, None], own, -jnp.inf), axis=0)

  scales = None
  for _ in range(iterations):
    blocks = map_blocks(functools.partial(of_block, scales=scales), (rows, valid), _ROWS)
    scales = -_log_sum_exp_over_mesh(blocks, axes)
  return scales


def _log_sum_exp_over_mesh(logits: Float[Array, "some prototypes"], axes: tuple[str, ...]) -> jax.Array:
  """Computes the log-sum-exp of each column over the rows of all devices."""
  largest = jnp.max(logits, axis=0)
  largest = finite(lax.pmax(largest, axes) if axes else largest)
  total = jnp.sum(jnp.exp(logits - largest), axis=0)
  return jnp.log(pairwise.global_sum(total, axes)) + largest
