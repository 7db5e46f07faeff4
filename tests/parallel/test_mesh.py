"""Mesh sizes, where parameters land, and that batches keep their order."""

import jax
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import (
  MeshSpec,
  batch_shards,
  host_share,
  linked_cycle,
  parameter_shardings,
  put_batch,
  ring_order,
)


@pytest.mark.parametrize(
  ("spec", "devices", "sizes"),
  [
    (MeshSpec(), 8, (8, 1, 1)),
    (MeshSpec(fsdp=4), 8, (2, 4, 1)),
    (MeshSpec(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2)),
    (MeshSpec(data=1), 1, (1, 1, 1)),
  ],
)
def test_minus_one_takes_the_rest(spec, devices, sizes):
  assert spec.sizes(devices) == sizes


@pytest.mark.parametrize(
  "spec", [MeshSpec(data=3), MeshSpec(fsdp=3), MeshSpec(data=-1, fsdp=-1), MeshSpec(tensor=0), MeshSpec(data=16)]
)
def test_sizes_that_do_not_fit_are_named(spec):
  with pytest.raises(UserError, match=rf"mesh.data={spec.data}, mesh.fsdp={spec.fsdp}, mesh.tensor={spec.tensor}"):
    spec.sizes(8)


def test_parameters_are_split_where_the_axis_divides_them():
  spec = MeshSpec(data=1, fsdp=4, tensor=2)
  mesh = spec.make()
  shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in {"even": (8, 6), "odd": (7, 5)}.items()}
  placed = parameter_shardings(mesh, spec, shapes, {"even": ("embed", "mlp"), "odd": ("embed", "mlp")})
  assert placed["even"].shard_shape((8, 6)) == (2, 3)
  assert placed["odd"].shard_shape((7, 5)) == (7, 5)
  # One mesh axis cannot split two axes of one array.
  square = parameter_shardings(mesh, spec, {"a": jax.ShapeDtypeStruct((8, 8), np.float32)}, {"a": ("embed", "embed")})
  assert square["a"].shard_shape((8, 8)) == (2, 8)


def test_a_batch_keeps_its_order_and_is_split_over_data_and_fsdp():
  mesh = MeshSpec(data=2, fsdp=2, tensor=2).make()
  rows = np.arange(24).reshape(8, 3)
  placed = put_batch(mesh, {"rows": rows})["rows"]
  np.testing.assert_array_equal(placed, rows)
  assert batch_shards(mesh) == 4 and placed.sharding.shard_shape(placed.shape) == (2, 3)
  assert host_share(mesh) == (0, 1)


@pytest.mark.parametrize(
  ("sides", "exists"),
  [((4, 4, 1), True), ((4, 8, 1), True), ((3, 4, 1), True), ((4, 4, 4), True), ((3, 4, 5), True), ((3, 3, 1), False)],
)
def test_blocks_go_round_over_direct_links(sides, exists, rng):
  places = [tuple(place) for place in rng.permutation(list(np.ndindex(sides))).tolist()]
  order = linked_cycle(places)
  if not exists:
    assert order is None
    return
  assert sorted(order) == list(range(len(places)))
  visited = np.array([places[shard] for shard in order])
  assert (np.abs(visited - np.roll(visited, 1, axis=0)).sum(axis=1) == 1).all()


def test_places_that_fill_no_grid_have_no_cycle():
  assert linked_cycle([(0, 0), (0, 1), (1, 0)]) is None
  assert linked_cycle([(0, 0), (0, 0), (0, 1), (0, 1)]) is None
  assert ring_order(MeshSpec().make()) is None
