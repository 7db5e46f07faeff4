"""The train step of a config, compiled for devices that need not exist."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding
from contrastive_jax.planning.topologies import Topology
from contrastive_jax.training import config as run_config
from contrastive_jax.training.state import TrainState

# TPU compilers refuse what cannot fit, in one of these sentences.
_NEEDED = (re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"), re.compile(r"temporaries \(([\d.]+)([KMGT])\)"))
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a step.

  Attributes:
    state: abstract state, with shardings.
    mesh: of the devices.
    text: optimised HLO; empty when the step does not fit.
    memory: bytes a device, by use: "arguments", "outputs", "aliased" (outputs in place of arguments), "temporaries",
      "code". Of a step that does not fit "arguments" and "temporaries" only.
    seconds: it took.
  """

  state: TrainState
  mesh: jax.sharding.Mesh
  text: str
  memory: dict[str, float]
  seconds: float

  @property
  def peak(self) -> float:
    """Bytes a device needs at once."""
    memory = self.memory
    held = memory["arguments"] + memory.get("outputs", 0) - memory.get("aliased", 0)
    return held + memory["temporaries"] + memory.get("code", 0)


def abstract_batch(config: Any, mesh: jax.sharding.Mesh) -> Batch:
  """Shapes, dtypes and shardings of the batches of a config at fixed resolution, as `data.pipeline` makes them."""
  model, pairs, sharding = run_config.model_config(config), config.batch_size, batch_sharding(mesh)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=sharding)

  patches = model.vision.grid**2
  return Batch(
    ImageBatch(array(jnp.uint8, patches, model.vision.patch_dim), array(jnp.int16, patches, 3)),
    TextBatch(array(jnp.int32, model.text.length), array(jnp.bool_, model.text.length), array(jnp.int32)),
  )


def device_bytes(tree: Any) -> int:
  """Bytes of a pytree of `jax.ShapeDtypeStruct` on one device."""
  return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def compile_step(config: Any, topology: Topology) -> Compiled:
  """Compiles the step of a checked config.

  Raises:
    UserError: for a mesh or a batch that does not divide over the devices, or see `Topology.devices`.
  """
  mesh = MeshSpec(**config.mesh).make(topology.devices())
  spec, step = run_config.build(config, mesh)
  state, batch = spec.abstract(), abstract_batch(config, mesh)
  began = time.perf_counter()
  lowered = step.lower(state, batch)
  try:
    compiled = lowered.compile(compiler_options=topology.compiler_options)
  except jax.errors.JaxRuntimeError as error:
    needed = bytes_needed(str(error), device_bytes((state, batch)))
    if needed is None:
      raise
    return Compiled(state, mesh, "", needed, time.perf_counter() - began)
  seconds = time.perf_counter() - began
  sizes = compiled.memory_analysis()
  memory = {
    "arguments": float(sizes.argument_size_in_bytes),
    "outputs": float(sizes.output_size_in_bytes),
    "aliased": float(sizes.alias_size_in_bytes),
    "temporaries": float(sizes.temp_size_in_bytes),
    "code": float(sizes.generated_code_size_in_bytes),
  }
  return Compiled(state, mesh, compiled.as_text(), memory, seconds)


def bytes_needed(message: str, arguments: int) -> dict[str, float] | None:
  """What a compiler that ran out of memory says the step needs; None when that is not what it says.

  Args:
    message: of the error.
    arguments: bytes of state and batch.
  """
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  total, temporaries = (pattern.search(message) for pattern in _NEEDED)
  if total:
    return {"arguments": float(arguments), "temporaries": float(total[1]) * _UNITS[total[2]] - arguments}
  if temporaries:
    return {"arguments": float(arguments), "temporaries": float(temporaries[1]) * _UNITS[temporaries[2]]}
  return None
