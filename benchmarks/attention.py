"""What attention costs, forward and backward: memory over long rows, cycles over short ones, time of its blocks.

  python -m benchmarks.attention                                       # timed on this machine's CPU
  .venv-plan/bin/python -m benchmarks.attention --topology=v5e:2x2     # compiled, not run (after `make plan`)
  .venv-plan/bin/python -m benchmarks.attention --topology=h100:4
  .venv-plan/bin/python -m benchmarks.attention --topology=v5e:2x2 --rows=128 --length=196 --heads=12 --head_dim=64

One layer's attention, 16 heads of 80 features (UniViTAR 0.6B): softmax by the kernel of the platform, sigmoid block by
block. Temporaries are what the compiler reserves in a device's main memory beyond inputs and gradients; with one row a
device, a TPU keeps much of a short row on the chip. Rows that are short enough for dense attention are unpacked images:
what `plan.py` expects beside that of `jax.nn.dot_product_attention`, rematerialised as the towers are. On a CPU,
dense attention and blocks take turns; only the ratio of one invocation means anything.
"""

import os

# Before JAX starts: compiling for other devices needs none, and timing is of the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.timing import taking_turns
from contrastive_jax.models.attention import DENSE_LENGTH, attend
from contrastive_jax.models.attention_xla import blockwise, dense
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding
from contrastive_jax.planning import costs, hlo, kernels, topologies

_TOPOLOGY = flags.DEFINE_string("topology", "", "Devices to compile for; none times this machine's CPU.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows a device, where it is compiled.")
_LENGTHS = flags.DEFINE_multi_integer("length", [], "Tokens of a row. [4096, 8192, 16384; 2048 and 4096 to be timed]")
_HEADS = flags.DEFINE_integer("heads", 16, "Attention heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 80, "Features of a head.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Where it is compiled; timing is in float32.")
_IMAGES = flags.DEFINE_integer("images", 8, "Images packed in a row that is timed.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each.")

# Targets of the calls of Pallas's kernels: on a TPU, on a GPU.
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")


def gradients(attention):
  """`(queries, keys, values, segments)` to the gradients of a sum of squares."""

  def loss(queries, keys, values, segment_ids):
    return jnp.sum(jnp.square(attention(queries, keys, values, segment_ids=segment_ids).astype(jnp.float32)))

  return jax.grad(loss, argnums=(0, 1, 2))


def compiled(topology: topologies.Topology, length: int, attention, packed: bool) -> jax.stages.Compiled:
  """The gradients of a layer's attention, for all devices of a topology."""
  mesh = MeshSpec().make(topology.devices())
  rows, sharding = _ROWS.value * topology.device_count, batch_sharding(mesh)
  tokens = jax.ShapeDtypeStruct((rows, length, _HEADS.value, _HEAD_DIM.value), _DTYPE.value, sharding=sharding)
  segment_ids = jax.ShapeDtypeStruct((rows, length), jnp.int16, sharding=sharding) if packed else None
  run = gradients(attention)

  def layer(*inputs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return run(*inputs)

  lowered = jax.jit(layer).lower(tokens, tokens, tokens, segment_ids)
  return lowered.compile(compiler_options=topology.compiler_options)


def report_memory(topology: topologies.Topology, length: int) -> None:
  kernel = compiled(topology, length, attend, packed=True)
  blocks = compiled(topology, length, functools.partial(attend, sigmoid_length=length), packed=True)
  calls = sum(kernel.as_text().count(f'custom_call_target="{target}"') for target in _KERNELS)
  held = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in (kernel, blocks)]
  logits = 4 * _ROWS.value * _HEADS.value * length**2
  print(
    f"{topology.name:8} {length:6} tokens: {calls} kernels {held[0]:8.1f} MiB,"
    f" blocks {held[1]:8.1f} MiB; dense logits alone {logits / 2**20:8.0f} MiB",
    flush=True,
  )


def report_expected(topology: topologies.Topology, length: int) -> None:
  def of_jax(queries, keys, values, *, segment_ids):
    return jax.nn.dot_product_attention(queries, keys, values, implementation="xla")

  programs = [compiled(topology, length, jax.checkpoint(each), packed=False) for each in (attend, of_jax)]
  found = (costs.analyse(hlo.parse(program.as_text())) for program in programs)
  ours, theirs = (kernels.computing_seconds(each, topology.chip) for each in found)
  print(
    f"{topology.name:8} {length:6} tokens: {1e3 * ours:.2f} ms, jax.nn.dot_product_attention {1e3 * theirs:.2f} ms;"
    f" time over its {ours / theirs:.2f}x",
    flush=True,
  )


def report_time(lengths: list[int]) -> None:
  for length in lengths:
    shape = (1, length, _HEADS.value, _HEAD_DIM.value)
    parts = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
    segment_ids = jnp.asarray(1 + np.arange(length) * _IMAGES.value // length)[None]
    contestants = [jax.jit(gradients(each)).lower(*parts, segment_ids).compile() for each in (dense, blockwise)]
    runs = [functools.partial(each, *parts, segment_ids) for each in contestants]
    taken = np.median(taking_turns(runs, _REPEATS.value)[..., 0], axis=1)
    held = [run.memory_analysis().temp_size_in_bytes / 2**20 for run in contestants]
    print(
      f"cpu {length:6} tokens: dense {taken[0]:.2f} s, {held[0]:.0f} MiB; blocks {taken[1]:.2f} s, {held[1]:.0f} MiB;"
      f" time over dense's {taken[1] / taken[0]:.2f}x",
      flush=True,
    )


def main(_) -> None:
  if _TOPOLOGY.value:
    topology = topologies.find(_TOPOLOGY.value)
    for length in _LENGTHS.value or [4096, 8192, 16384]:
      expects = topology.chip.clock and length <= DENSE_LENGTH
      (report_expected if expects else report_memory)(topology, length)
  else:
    report_time(_LENGTHS.value or [2048, 4096])


if __name__ == "__main__":
  app.run(main)
