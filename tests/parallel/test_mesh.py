"""Mesh sizes, where parameters land, and that batches keep their order."""

import os
import subprocess
import sys

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


REPEATED = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from contrastive_jax.losses import distillation
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
mesh = MeshSpec().make()
rng = np.random.default_rng(0)
arrays = [jax.device_put(rng.normal(size=(64, 16)).astype(np.float32), batch_sharding(mesh)) for _ in range(4)]

def loss(*arrays):
  options = {"logit_scale": 3.0, "axis_name": ("data", "fsdp"), "tile": 8}
  terms = distillation.similarity_distillation, distillation.relational_distillation
  return sum(term(*arrays, **options)[0] for term in terms)

on_mesh = jax.shard_map(loss, mesh=mesh, in_specs=PartitionSpec(("data", "fsdp")), out_specs=PartitionSpec())
run = jax.jit(jax.value_and_grad(on_mesh, argnums=(0, 1)))
results = {tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run(*arrays))) for _ in range(100)}
print(len(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_has_one_result_whatever_the_cache_holds(devices, tmp_path):
  """What several CPU devices take from the cache of compiled programs is wrong, so that they must not use it."""
  cache = tmp_path / "compiled"
  environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  for _ in range(2):
    command = [sys.executable, "-c", REPEATED, str(devices)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr[-2000:]
  assert cache.exists() == (devices == 1)
