"""State of every sample of the data, split over the devices: the rows of a step's pairs are read and written back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.reductions import collective, gathered
from contrastive_jax.objectives.term import Sizes

# The number of rows is a multiple of this, so that the state has one shape on all meshes whose devices divide it.
MULTIPLE = 4096


def row_count(samples: int) -> int:
  """Returns the number of rows that the state of so many samples has."""
  return -(-samples // MULTIPLE) * MULTIPLE


def rows_of(term: str, asked: int | None, sizes: Sizes) -> int:
  """Returns the number of rows of a term that keeps a state for every sample.

  Args:
    term: the name of the term, for errors.
    asked: number of samples that its options name, or None.
    sizes: the sizes of the run.

  Raises:
    UserError: if the sources have more samples than were asked for, or nothing says how many they have.
  """
  if asked is not None and asked < sizes.samples:
    raise UserError(
      f"loss_options.{term}.samples={asked} is less than the {sizes.samples} samples of the sources: raise it, or leave"
      " it out"
    )
  if not (asked or sizes.samples):
    raise UserError(
      f"{term} keeps a state for every sample, and nothing says how many there are: set loss_options.{term}.samples"
    )
  return row_count(asked or sizes.samples)


def read(state: Any, rows: Int[Array, "pairs"], axes: tuple[str, ...]) -> Any:
  """Reads the state of this device's pairs.

  Args:
    state: pytree of `[rows of this device, ...]` vectors.
    rows: the row of each pair, counted over all devices.
    axes: mesh axes that pairs and rows are split over; empty on one device.
  """
  if not axes:
    return jax.tree.map(lambda leaf: leaf[rows], state)
  index, mine = _own(state, lax.all_gather(rows, axes, tiled=True), axes)
  found = jax.tree.map(lambda leaf: jnp.where(mine, leaf[index], 0), state)
  return collective(lambda leaf, axis: lax.psum_scatter(leaf, axes, scatter_dimension=axis, tiled=True), found)


def write(state: Any, rows: Int[Array, "pairs"], values: Any, axes: tuple[str, ...]) -> Any:
  """Returns the state with the pairs' rows replaced; of pairs that share a row the first one counts."""
  if axes:
    rows = lax.all_gather(rows, axes, tiled=True)
    values = gathered(values, axes)
  index, mine = _own(state, rows, axes)
  length = jax.tree.leaves(state)[0].shape[0]
  target = jnp.where(mine & _is_first(rows), index, length)
  return jax.tree.map(lambda leaf, new: leaf.at[target].set(new.astype(leaf.dtype), mode="drop"), state, values)


def _own(state: Any, rows: Int[Array, "all_pairs"], axes: tuple[str, ...]) -> tuple[Array, Bool[Array, "all_pairs"]]:
  """Returns the place of each row among those of this device, and whether it is here at all."""
  length = jax.tree.leaves(state)[0].shape[0]
  index = rows - (pairwise.pair_index(length, axes)[0] if axes else 0)
  mine = (index >= 0) & (index < length)
  return jnp.where(mine, index, 0), mine


def _is_first(rows: Int[Array, "all_pairs"]) -> Bool[Array, "all_pairs"]:
  order = jnp.argsort(rows, stable=True)
  ordered = rows[order]
  fresh = jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])
  return jnp.zeros_like(fresh).at[order].set(fresh)
