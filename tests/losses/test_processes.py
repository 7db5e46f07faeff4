"""Two processes of two devices give the value and gradients of one process of four."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests import runs

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from contrastive_jax import losses
from contrastive_jax.parallel import distributed
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec, host_share, put_batch

name, strategy, output = sys.argv[1:]
distributed.initialize()
mesh = MeshSpec(fsdp=2).make()
rng = np.random.default_rng(0)
image, text = rng.standard_normal((2, 52, 7)).astype(np.float32)
group = rng.integers(0, 40, 52, np.int32)
share, count = host_share(mesh)
rows = slice(share * 52 // count, (share + 1) * 52 // count)

def local(image, text, group, scale, bias):
  options = {"logit_scale": scale, "logit_bias": bias, "group": group, "axis_name": BATCH_AXES, "tile": 5}
  return losses.OBJECTIVES[name](image, text, strategy=strategy, **options)[0]

pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
island = jax.shard_map(local, mesh=mesh, in_specs=(pairs,) * 3 + (everywhere,) * 2, out_specs=everywhere)
batch = put_batch(mesh, (image[rows], text[rows], group[rows]))
value, gradients = jax.jit(jax.value_and_grad(island, argnums=(0, 1, 3, 4)))(*batch, jnp.float32(3), jnp.float32(-1))
sides = multihost_utils.process_allgather(gradients[:2], tiled=True)
if distributed.is_main():
  np.savez(output, value, *sides, *gradients[2:])
"""


def compute(name: str, strategy: str, output: Path, processes: int) -> list[np.ndarray]:
  """Value and gradients from `processes` of four devices in all."""
  start = functools.partial(runs.start, "-c", PROGRAM, name, strategy, str(output), devices=4 // processes)
  for process in runs.start_together(start, processes):
    runs.finish(process)
  with np.load(output) as arrays:
    return list(arrays.values())


@pytest.mark.parametrize(("name", "strategy"), [("sigmoid", "ring"), ("softmax", "gather"), ("softmax", "ring")])
def test_processes_change_nothing(name, strategy, tmp_path):
  one, two = (compute(name, strategy, tmp_path / f"{count}.npz", count) for count in (1, 2))
  for alone, together in zip(one, two, strict=True):
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-7 * np.abs(alone).max())
