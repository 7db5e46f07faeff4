"""Gradients of a large batch with the memory of a small one.

The towers embed one micro-batch after another and keep nothing else; one loss sees all embeddings; then the towers run
again, this time with the gradient of their embeddings at hand. Gao et al., "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup" (arXiv 2101.06983).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.models import dual_encoder
from contrastive_jax.parallel.mesh import BATCH_AXES, batch_sharding, batch_shards


def split(tree: Any, count: int, mesh: Mesh) -> Any:
  """Cuts arrays `[rows, ...]` into `[count, rows / count, ...]`; every device's rows are cut, and none leaves it."""
  shards = batch_shards(mesh)
  placed = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

  def cut(leaf):
    pieces = jnp.moveaxis(leaf.reshape(shards, count, -1, *leaf.shape[1:]), 1, 0)
    return lax.with_sharding_constraint(pieces.reshape(count, -1, *leaf.shape[1:]), placed)

  return jax.tree.map(cut, tree)


def join(tree: Any, mesh: Mesh) -> Any:
  """Undoes `split`."""
  shards = batch_shards(mesh)

  def uncut(leaf):
    pieces = jnp.moveaxis(leaf.reshape(leaf.shape[0], shards, -1, *leaf.shape[2:]), 0, 1)
    return lax.with_sharding_constraint(pieces.reshape(-1, *leaf.shape[2:]), batch_sharding(mesh))

  return jax.tree.map(uncut, tree)


def split_batch(batch: Any, count: int, mesh: Mesh) -> Any:
  """Cuts a batch into micro-batches, stacked along a new leading axis; a pair's packed row must be cut with it.

  Args:
    batch: a pytree with images and texts in it, such as a `Batch` or the inputs of a teacher.
    count: number of micro-batches.
    mesh: the mesh that the pairs lie on.
  """

  def renumbered(pieces, whole):
    if not isinstance(whole, ImageBatch | TextBatch) or whole.locations is None:
      return pieces
    # Row numbers count the whole batch's rows; those of a micro-batch count its own.
    rows = jax.tree.leaves(whole)[0].shape[0] // batch_shards(mesh)
    share = rows // count
    row, segment = pieces.locations[..., 0], pieces.locations[..., 1]
    own = row // rows * share + row % rows % share
    return dataclasses.replace(pieces, locations=jnp.stack([own, segment], axis=-1))

  return jax.tree.map(
    renumbered, split(batch, count, mesh), batch, is_leaf=lambda node: isinstance(node, ImageBatch | TextBatch)
  )


def embed(graphdef: Any, params: Any, batch: Batch, count: int, mesh: Mesh) -> dict[str, jax.Array]:
  """Embeds a batch without noise, one micro-batch after the other, and keeps nothing for a backward pass.

  Args:
    graphdef: the graph definition of the dual encoder.
    params: its parameters.
    batch: the pairs.
    count: number of micro-batches.
    mesh: the mesh that the pairs lie on.

  Returns:
    The embeddings of the whole batch, by the name of the tower. Hard captions and strong views are left out.
  """

  def run(part: Batch) -> dict[str, jax.Array]:
    part = dataclasses.replace(part, hard_captions=None, strong=None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      outputs = dual_encoder.merge(graphdef, params)(part)
    return {name: output.embedding for name, output in outputs.items()}

  if count == 1:
    return run(batch)
  return join(lax.map(run, split_batch(batch, count, mesh)), mesh)


def value_and_grad(
  run: Callable[[Any, Any], tuple[Any, Any]],
  global_loss: Callable[[Any, Any], tuple[jax.Array, Any]],
  local_loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
  params: Any,
  parts: Any,
  *,
  mesh: Mesh,
  shardings: Any,
) -> tuple[tuple[jax.Array, Any], Any]:
  """Computes value and gradients of `global_loss(params, embeddings of all parts) + sum over parts of local_loss`.

  Args:
    run: a function from parameters and one part to its embeddings, a pytree of `[pairs, ...]`, and to all that
      `local_loss` reads of it, of which nothing is kept.
    global_loss: a function from parameters and the whole batch's embeddings to a value and what goes with it.
    local_loss: a function from parameters, the second result of `run` and the part to its share of the value and of
      the metrics.
    params: the parameters to differentiate by.
    parts: pytree with the micro-batches along the leading axis, as `split_batch` makes it.
    mesh: the mesh that the pairs lie on.
    shardings: the shardings of the gradients while they are summed.

  Returns:
    `((value, (what goes with the global value, metrics of the local ones)), gradients)`, equal to those of the batch in
    one piece: `run` must draw its noise by pair.
  """
  embeddings = lax.map(lambda part: run(params, part)[0], parts)
  with_loss = jax.value_and_grad(
    lambda params, stacked: global_loss(params, join(stacked, mesh)), argnums=(0, 1), has_aux=True
  )
  (value, beside), (gradients, cotangents) = with_loss(params, embeddings)

  def add(gradients, part_and_cotangent):
    part, cotangent = part_and_cotangent

    def again(params):
      embedded, made = run(params, part)
      return (embedded, *local_loss(params, made, part))

    (_, share, shares), pull = jax.vjp(again, params)
    unused = jax.tree.map(jnp.zeros_like, shares)
    (more,) = pull((cotangent, jnp.ones_like(share), unused))
    total = jax.tree.map(jnp.add, gradients, more)
    return lax.with_sharding_constraint(total, shardings), (share, shares)

  gradients, locals_ = lax.scan(add, lax.with_sharding_constraint(gradients, shardings), (parts, cotangents))
  share, shares = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), locals_)
  return (value + share, (beside, shares)), gradients
