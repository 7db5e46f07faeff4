"""The device mesh: its axes, their sizes, and where arrays and parameters go on them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from contrastive_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Sizes of the mesh axes and the rules that place logical axes on them.

  Attributes:
    data: number of devices that hold copies of the parameters and different pairs. -1 takes all that the other axes
      leave.
    fsdp: number of devices that share one copy of the parameters and hold different pairs.
    tensor: number of devices that share one layer's matrix products on the same pairs.
    rules: (logical axis of a parameter, mesh axis) for each axis that is split; the others are replicated.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: tuple[tuple[str, str], ...] = (("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("vocab", "tensor"))

  def sizes(self, device_count: int) -> tuple[int, int, int]:
    """Returns the axis sizes with -1 filled in.

    Raises:
      UserError: if the sizes do not multiply to `device_count`.
    """
    sizes = (self.data, self.fsdp, self.tensor)
    named = f"mesh.data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise UserError(
        f"{named}: every mesh axis is a positive number of devices, and one may be -1, which gets all that remain"
      )
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and device_count % known == 0:
      return tuple(device_count // known if size == -1 else size for size in sizes)
    if known != device_count or -1 in sizes:
      raise UserError(f"{named} does not fit {device_count} devices: choose axes whose product is {device_count}")
    return sizes

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh over `devices` (default: all), with axes that the partitioner is free to use."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = self.sizes(len(devices))
    _without_cached_programs(devices)
    # Where the sizes do not match a TPU's torus, an axis may take part of one of its sides.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _without_cached_programs(devices: Sequence[jax.Device]) -> None:
  """Turns JAX's compilation cache off for the process if the mesh has several CPU devices.

  A program that jaxlib 0.10.2 reads from the cache runs its collectives there in no fixed order: it computes wrong
  numbers, or hangs.
  """
  if len(devices) > 1 and devices[0].platform == "cpu" and jax.config.jax_enable_compilation_cache:
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX asks once a process whether there is a cache; this makes it ask again.
    compilation_cache.reset_cache()


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is the same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose leading axis is split over all devices that hold different pairs."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def ring_order(mesh: Mesh) -> tuple[int, ...] | None:
  """Orders the batch shards so that each one's device is linked to the next one's, and the last to the first.

  Returns:
    Indices along `BATCH_AXES`, or None: devices other than TPUs do not say where they are, and with tensor parallelism
    a shard lies on several.
  """
  devices = mesh.devices.flatten()
  if mesh.shape["tensor"] > 1 or not all(hasattr(device, "coords") for device in devices):
    return None
  return linked_cycle([tuple(device.coords) for device in devices])


def linked_cycle(places: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
  """Returns indices of `places` in the order of a cycle of neighbours in their grid, without links around its ends.

  There is none where they do not fill a grid, two of them are one, or all sides are odd; it then returns None.
  """
  index = {place: i for i, place in enumerate(places)}
  sides = [sorted(set(axis)) for axis in zip(*places, strict=True)]
  if not math.prod(map(len, sides)) == len(index) == len(places):
    return None
  cycle = _grid_cycle([len(side) for side in sides])
  return cycle and tuple(index[tuple(side[i] for side, i in zip(sides, cell, strict=True))] for cell in cycle)


def _grid_cycle(sides: Sequence[int]) -> list[tuple[int, ...]] | None:
  """Returns all places of a grid in a cycle of neighbours, without links around its ends."""
  rows, columns = _grid_path(sides[:1]), _grid_path(sides[1:])
  turned = len(rows) % 2 == 1
  if turned:
    rows, columns = columns, rows
  if len(rows) % 2 or len(columns) == 1:
    return None
  # Along the first row, then back and forth without the first column, which leads home.
  cells = [(0, j) for j in range(len(columns))]
  for i in range(1, len(rows)):
    there = range(1, len(columns))
    cells += [(i, j) for j in (reversed(there) if i % 2 else there)]
  cells += [(i, 0) for i in range(len(rows) - 1, 0, -1)]
  return [columns[j] + rows[i] if turned else rows[i] + columns[j] for i, j in cells]


def _grid_path(sides: Sequence[int]) -> list[tuple[int, ...]]:
  """Returns all places of a grid, each a neighbour of the one before."""
  if not sides:
    return [()]
  rest = _grid_path(sides[1:])
  return [(i, *place) for i in range(sides[0]) for place in (reversed(rest) if i % 2 else rest)]


def batch_shards(mesh: Mesh) -> int:
  """Returns the number of shards that the leading axis of a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parameter_shardings(mesh: Mesh, spec: MeshSpec, abstract: Any, logical_axes: Any) -> Any:
  """Returns a `NamedSharding` for every parameter.

  An axis whose length the mesh axis does not divide is replicated: odd vocabularies and class counts train on any mesh.

  Args:
    mesh: the mesh.
    spec: the sizes and rules of the mesh.
    abstract: nested dict of arrays or `jax.ShapeDtypeStruct`.
    logical_axes: nested dict of the same structure; each leaf is a tuple with a logical axis name or None for each
      dimension.
  """
  rules = dict(spec.rules)

  def place(leaf, axes):
    taken: set[str] = set()
    placed = []
    for length, axis in zip(leaf.shape, axes, strict=True):
      target = rules.get(axis)
      fits = target is not None and target not in taken and length % mesh.shape[target] == 0
      placed.append(target if fits else None)
      taken.add(target)
    return NamedSharding(mesh, PartitionSpec(*placed))

  return jax.tree.map(place, abstract, logical_axes)


def host_share(mesh: Mesh) -> tuple[int, int]:
  """Returns (index, count) of the share of every batch that this process loads.

  These are the rows from `index * batch / count` on, `batch / count` of them.

  Processes whose devices differ only along the tensor axis load the same rows.

  Raises:
    UserError: if the rows of this process are not one block.
  """
  shards = batch_shards(mesh)
  slices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  rows = sorted({row for (piece,) in slices for row in range(*piece.indices(shards))})
  count, remainder = divmod(shards, len(rows))
  if remainder or rows[0] % len(rows) or rows[-1] - rows[0] + 1 != len(rows):
    raise UserError(
      f"mesh.data={mesh.shape['data']}, mesh.fsdp={mesh.shape['fsdp']} would give process {jax.process_index()} the"
      f" batch shards {rows} of {shards}: choose mesh sizes that are multiples of the devices of one host"
    )
  return rows[0] // len(rows), count


def put_batch(mesh: Mesh, batch: Any) -> Any:
  """Moves this host's rows (a pytree of NumPy arrays) to its devices, as one global array for each leaf."""
  sharding = batch_sharding(mesh)
  _, count = host_share(mesh)

  def put(rows):
    return jax.make_array_from_process_local_data(sharding, rows, (rows.shape[0] * count, *rows.shape[1:]))

  return jax.tree.map(put, batch)
