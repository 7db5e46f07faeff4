"""The engine: visits every (row, column) tile of the similarity matrix of the whole mesh, one tile at a time.

Rows (images) stay on their device. Columns (texts) of other devices arrive by one all-gather (`gather`) or a block at a
time around a ring of collective-permutes (`ring`), and what is accumulated for them travels back to where they live.
Inside a block, loops over tiles bound the logits that exist at once.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt32

from contrastive_jax.batch import AnyArray
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.losses.reductions import Accumulator, Packed

STRATEGIES = ("gather", "ring")

# Up to this many logits on a device a softmax makes them once, as one tile, and keeps them for the backward pass.
DIRECT = 2048 * 2048
# Above it they are made twice, in tiles. Larger ones multiply faster; in a small block they would outweigh its
# embeddings. Block size from which on -> largest rows and columns of a tile.
TILES = {8192: (1024, 1024), 2048: (1024, 512), 0: (256, 512)}

# `tile_fn(rows, columns, fresh) -> (row accumulators, column accumulators)` of one tile. `fresh` is None or marks the
# pairs that no earlier tile has counted.
TileFn = Callable[[Any, Any, Bool[Array, "a b"] | None], tuple[Any, Any]]

# The embeddings of each view of the same instances.
Views = Sequence[Float[Array, "pairs dim"]]
# What a user says of which pairs are alike: one label a pair, or several keys of 64 bits.
Group = Integer[Array, "pairs"] | UInt32[Array, "pairs keys 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """Which pairs are alike, and which there are, as the engine compares them.

  Attributes:
    words: the words of each key, each a vector over the pairs. Two pairs share a key when all its words are equal.
    present: bool `[pairs]`, which pairs there are: one that is not is nobody's negative and has none. None are all.
  """

  words: tuple[tuple[AnyArray, ...], ...]
  present: AnyArray | None = None

  def and_those(self, others: "Keys") -> "Keys":
    """Returns the keys of pairs and, after them, those of others in the same places."""
    return dataclasses.replace(self, words=self.words + others.words)


def mesh_axes(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes that pairs are split over, as a tuple; empty on one device."""
  if axis_name is None:
    return ()
  return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def device_count(axes: tuple[str, ...]) -> int:
  return lax.axis_size(axes) if axes else 1


def global_sum(value: Shaped[Array, "*shape"], axes: tuple[str, ...]) -> Shaped[Array, "*shape"]:
  """Sums over the mesh, entry by entry; the result is the same on every device."""
  return lax.psum(value, axes) if axes else value


def vary(tree: Any, *like: Any, axes: tuple[str, ...] = ()) -> Any:
  """Marks arrays as device-varying over `axes` and over whatever `like` varies over.

  Loop carries must have one type, and the gradient of a replicated scalar is summed over the mesh where it is marked.
  """
  target = set(axes).union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(like)))

  def mark(leaf):
    missing = tuple(sorted(target - jax.typeof(leaf).manual_axis_type.varying))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(mark, tree)


def check(strategy: str, tile: int | None) -> None:
  """Raises a `UserError` unless the `strategy` of a loss is known and its `tile` is None or a positive integer."""
  require_known("strategy", strategy, STRATEGIES)
  if tile is not None and tile < 1:
    raise UserError(f"tile={tile} must be at least 1, or None to let the library choose")


def check_views(views: Views, strategy: str, tile: int | None) -> None:
  """Raises a `UserError` as `check` does, and for fewer than two views of the instances."""
  check(strategy, tile)
  if len(views) < 2:
    raise UserError(f"a loss of several views has {len(views)}: give at least two")


def tile_shape(rows: int, columns: int, tile: int | None) -> tuple[int, int]:
  """Returns the rows and columns of the tiles that cover a block: at most `tile` of each, with little overlap."""
  limits = (tile, tile)
  if tile is None:
    limits = next(limits for size, limits in TILES.items() if min(rows, columns) >= size)
  return tuple(math.ceil(size / math.ceil(size / limit)) for size, limit in zip((rows, columns), limits, strict=True))


def pair_index(count: int, axes: tuple[str, ...]) -> Array:
  """Returns the global index of each of this device's `count` pairs."""
  first = lax.axis_index(axes) * count if axes else 0
  return first + jnp.arange(count, dtype=jnp.int32)


def keys_of(
  group: Group | None, count: int, axes: tuple[str, ...], present: Bool[Array, "pairs"] | None = None
) -> Keys:
  """Returns the keys of this device's `count` pairs; where `group` is None, that is the global index of each.

  Args:
    group: which pairs are alike, or None.
    count: number of this device's pairs.
    axes: mesh axes that the pairs are split over.
    present: which pairs are not left out; None leaves none out.

  Raises:
    UserError: for a group of another shape.
  """
  if group is None:
    group = pair_index(count, axes)
  if group.ndim == 1:
    return Keys(((group,),), present)
  if group.ndim != 3 or group.shape[1] < 1 or group.shape[2] != 2:
    raise UserError(f"group has the shape {group.shape}: it holds labels [pairs] or 64-bit keys [pairs, keys, 2]")
  # Vectors, as an array whose last axis has two elements would take 64 times its size on a TPU.
  words = tuple(tuple(group[:, key, word] for word in range(2)) for key in range(group.shape[1]))
  return Keys(words, present)


def share_a_key(first: Keys, second: Keys) -> Bool[Array, "pairs"]:
  """Says of pairs and others in the same places whether they share a key."""
  same = False
  for one, other in zip(first.words, second.words, strict=True):
    equal = True
    for word, other_word in zip(one, other, strict=True):
      equal = equal & (word == other_word)
    same = same | equal
  return same


def sweep(
  tile_fn: TileFn,
  rows: Any,
  columns: Any,
  empty: tuple[Any, Any],
  *,
  axes: tuple[str, ...] = (),
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Any, Any]:
  """Accumulates `tile_fn` over all tiles.

  Args:
    tile_fn: a function of a slice of `rows`, a slice of `columns` and the mask of pairs not yet counted (None for all)
      that returns the tile's accumulators. It is not differentiated: callers supply gradients by `jax.custom_vjp`.
    rows: pytree of arrays with this device's rows as leading axis.
    columns: pytree of arrays with this device's columns as leading axis.
    empty: accumulators of this device's rows and columns that have seen nothing.
    axes: mesh axes that rows and columns are split over.
    strategy: "gather" holds all columns at once, "ring" two blocks of them.
    tile: largest number of rows and of columns of a tile; None chooses from the shapes.
    ring_order: the devices, as indices along `axes`, in the order in which blocks go from the next to the one before;
      None is 0, 1, 2 and so on. Where a hop crosses one link, compilers can hide it.

  Returns:
    The accumulators of this device's rows and columns, complete over the whole mesh.
  """
  empty_rows, empty_columns = vary(empty, rows, columns, axes=axes)
  columns = Packed.of(columns)
  devices = device_count(axes)
  if devices == 1:
    return _block(tile_fn, rows, columns, empty_rows, empty_columns, tile)
  if strategy == "gather":
    everywhere = columns.map(lambda leaf, axis: lax.all_gather(leaf, axes, axis=axis, tiled=True))
    repeated = jax.tree.map(lambda leaf: jnp.tile(leaf, (devices,) + (1,) * (leaf.ndim - 1)), empty_columns)
    row_totals, column_totals = _block(tile_fn, rows, everywhere, empty_rows, repeated, tile)
    return row_totals, _each(lambda total: total.scatter(axes), column_totals)

  order = range(devices) if ring_order is None else ring_order
  hops = [(order[i], order[i - 1]) for i in range(devices)]

  def send(tree):
    return tree.map(lambda leaf, _: lax.ppermute(leaf, axes, hops))

  def step(_, carry):
    columns, row_totals, column_totals = carry
    # Both sends start before the block is computed and do not depend on it, so that they hide behind the compute. The
    # totals therefore travel one step behind: this block's part is added to them when they arrive.
    following, arrived = send(columns), send(column_totals).tree()
    row_totals, part = _block(tile_fn, rows, columns, row_totals, empty_columns, tile)
    return following, row_totals, Packed.of(_merge(arrived, part))

  _, row_totals, column_totals = lax.fori_loop(0, devices, step, (columns, empty_rows, Packed.of(empty_columns)))
  return row_totals, send(column_totals).tree()


def _block(tile_fn: TileFn, rows: Any, columns: Packed, row_totals: Any, column_totals: Any, tile: int | None):
  """Adds all tiles of one block of the matrix to its accumulators."""
  counts = len(jax.tree.leaves(rows)[0]), len(columns.others[0])
  shape = tile_shape(*counts, tile)
  if shape == counts:
    row_part, column_part = tile_fn(rows, columns.tree(), None)
    return _merge(row_totals, row_part), _merge(column_totals, column_part)
  rows = Packed.of(rows)
  row_tiles, column_tiles = (math.ceil(count / size) for count, size in zip(counts, shape, strict=True))

  def window(index: Array, axis: int):
    """Returns the start of a tile, and which of its lines are new: the last tile moves back to stay inside."""
    nominal = index * shape[axis]
    start = jnp.minimum(nominal, counts[axis] - shape[axis])
    return start, start + jnp.arange(shape[axis]) >= nominal

  def column_step(j, carry):
    row_totals, column_totals = carry
    first_column, new_columns = window(j, 1)
    column_tile = _cut(columns, first_column, shape[1])

    def row_step(i, carry):
      row_totals, column_total = carry
      first_row, new_rows = window(i, 0)
      ragged = row_tiles * shape[0] > counts[0] or column_tiles * shape[1] > counts[1]
      fresh = new_rows[:, None] & new_columns[None, :] if ragged else None
      row_part, column_part = tile_fn(_cut(rows, first_row, shape[0]), column_tile, fresh)
      row_total = _merge(_slice(row_totals, first_row, shape[0]), row_part)
      return _update(row_totals, row_total, first_row), _merge(column_total, column_part)

    column_total = _slice(column_totals, first_column, shape[1])
    row_totals, column_total = lax.fori_loop(0, row_tiles, row_step, (row_totals, column_total))
    return row_totals, _update(column_totals, column_total, first_column)

  return lax.fori_loop(0, column_tiles, column_step, (row_totals, column_totals))


def _cut(packed: Packed, start: Array, size: int) -> Any:
  return packed.map(lambda leaf, axis: lax.dynamic_slice_in_dim(leaf, start, size, axis)).tree()


def _slice(totals: Any, start: Array, size: int) -> Any:
  return _each(lambda total: total.cut(start, size), totals)


def _update(totals: Any, parts: Any, start: Array) -> Any:
  return _each(lambda total, part: total.put(part, start), totals, parts)


def _each(function: Callable, *trees: Any) -> Any:
  return jax.tree.map(function, *trees, is_leaf=lambda node: isinstance(node, Accumulator))


def _merge(totals: Any, parts: Any) -> Any:
  return _each(lambda total, part: total.merge(part), totals, parts)
