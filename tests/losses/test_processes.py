"""Two processes of two devices give the value and gradients of one process of four, and read no more than it."""

import functools
import json
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


READING = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from contrastive_jax import losses
from contrastive_jax.parallel import distributed
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec, host_share, put_batch
from contrastive_jax.schedule.segments import Segment
from data.pipeline import Pipeline
from tests.data.toy import ToySource, WordTokenizer
from tests.losses.test_processes import GROUPS, CAPTIONS, TABLE

class Counting(ToySource):
  read = []
  def __getitem__(self, index):
    self.read.append(index)
    return super().__getitem__(index)

distributed.initialize()
mesh = MeshSpec().make()
index, count = host_share(mesh)
source = Counting("toy", 48, groups=GROUPS, captions=[(c,) for c in CAPTIONS])
pipeline = Pipeline(
  (Segment(1, 48, (("toy", 1.0),), 8),), {"toy": source}, WordTokenizer(), text_length=4, patch_size=4, seed=5,
  host_index=index, host_count=count, threads=0,
)
batch = pipeline.batch(0)
sides = np.array(TABLE, np.float32)[:, batch.ids]

def local(image, text, keys):
  value = lambda loss, **how: loss(image, text, logit_scale=5.0, group=keys, axis_name=BATCH_AXES, tile=5, **how)[0]
  return value(losses.sigmoid_loss, logit_bias=-2.0), value(losses.softmax_loss, strategy="ring")

pairs = PartitionSpec(BATCH_AXES)
island = jax.shard_map(local, mesh=mesh, in_specs=(pairs,) * 3, out_specs=PartitionSpec())
values = jax.jit(island)(*put_batch(mesh, (*sides, batch.keys)))
print("RESULT", json.dumps({"values": list(map(float, values)), "read": source.read, "texts": source.text_reads}))
"""

# Every pair shares its group with one other and its caption with another one, wherever they are read.
GROUPS = [k // 2 for k in range(48)]
CAPTIONS = [f"caption {(k + 1) % 48 // 2}" for k in range(48)]
TABLE = np.random.default_rng(3).standard_normal((2, 48, 6)).tolist()


def test_two_processes_read_their_own_rows_and_tell_all_pairs_apart():
  found = []
  for process in runs.start_together(functools.partial(runs.start, "-c", READING, devices=2), 2):
    line = next(line for line in runs.finish(process).splitlines() if line.startswith("RESULT"))
    found.append(json.loads(line.removeprefix("RESULT")))
  first, second = found
  assert len(first["read"]) == len(second["read"]) == first["texts"] == second["texts"] == 24
  assert sorted(first["read"] + second["read"]) == list(range(48))
  home = np.isin(np.arange(48), first["read"])
  group, caption = np.array(GROUPS), np.array(CAPTIONS)
  shared = (group[:, None] == group) | (caption[:, None] == caption)
  assert (shared & (home[:, None] != home)).any()

  image, text = np.array(TABLE)
  cosine, own = image @ text.T, np.eye(48, dtype=bool)
  counts, sign = own | ~shared, np.where(own, 1, -1)
  sigmoid = np.sum(np.where(counts, np.logaddexp(0, -sign * (5 * cosine - 2)), 0)) / 48
  logits = np.where(counts, 5 * cosine, -np.inf)
  softmax = np.mean([np.logaddexp.reduce(logits, axis=axis) - 5 * np.diag(cosine) for axis in (0, 1)])
  for each in found:
    assert each["values"] == pytest.approx([sigmoid, softmax], rel=1e-5)
