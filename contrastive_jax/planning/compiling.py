"""The train step of a config, compiled for devices that need not exist."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models import flops
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.planning.topologies import Topology
from contrastive_jax.schedule.segments import Segment
from contrastive_jax.training.run import Run
from contrastive_jax.training.state import TrainState

# TPU compilers refuse what cannot fit, in one of these sentences.
_NEEDED = (re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"), re.compile(r"temporaries \(([\d.]+)([KMGT])\)"))
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step.

  Attributes:
    kind: name of the kind of batch, as `kinds_of_batch` lists them.
    state: the abstract state, with shardings.
    batch: the abstract batch, with shardings.
    forward_flops: number of FLOPs of embedding the batch.
    mesh: the mesh of the devices.
    text: the optimised HLO; empty when the step does not fit.
    memory: bytes on each device, by use: "arguments", "outputs", "aliased" (outputs in place of arguments),
      "temporaries", "code". For a step that does not fit, only "arguments" and "temporaries" are known.
    seconds: duration of the compilation.
  """

  kind: str
  state: TrainState
  batch: Batch
  forward_flops: float
  mesh: jax.sharding.Mesh
  text: str
  memory: dict[str, float]
  seconds: float

  @property
  def peak(self) -> float:
    """Returns the bytes that a device needs at once."""
    memory = self.memory
    held = memory["arguments"] + memory.get("outputs", 0) - memory.get("aliased", 0)
    return held + memory["temporaries"] + memory.get("code", 0)


def device_bytes(tree: Any) -> int:
  """Counts the bytes of a pytree of `jax.ShapeDtypeStruct` on one device."""
  return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def kinds_of_batch(run: Run) -> dict[str, tuple[Segment, str, int]]:
  """Lists the segment, modality and row length of every kind of batch that the steps of a run have, by name.

  A name is that of the stage, with "/clip" for clips and ":<length>" for one of several lengths.

  Raises:
    UserError: if two stages have one name.
  """
  model, kinds = run.model, {}
  for segment in run.segments:
    for modality in segment.modalities:
      lengths = segment.inputs(modality).row_lengths(model.image.patch_size, model.image.tubelet)
      for length in lengths:
        name = segment.name + ("/clip" if modality == "clip" else "") + (f":{length}" if len(lengths) > 1 else "")
        if name in kinds:
          raise UserError(f"two stages of the curriculum are named '{segment.name}': give each a name of its own")
        kinds[name] = segment, modality, length
  return kinds


def steps_of(run: Run, kind: str) -> int | float:
  """Returns the number of steps of a run that have one kind of batch, as `kinds_of_batch` names it.

  Of lengths that are drawn for each batch it is the number that is expected.
  """
  segment, modality, _ = kinds_of_batch(run)[kind]
  lengths = segment.inputs(modality).row_lengths(run.model.image.patch_size, run.model.image.tubelet)
  steps = segment.steps_of(modality, segment.steps)
  return steps if len(lengths) == 1 else steps / len(lengths)


def choose_batch(run: Run, stage: str | None, mesh: jax.sharding.Mesh) -> tuple[str, Batch, float]:
  """Returns a kind of batch, as `kinds_of_batch` names it, with its abstract batch and the FLOPs of embedding that.

  None chooses the most costly kind.

  Raises:
    UserError: for an unknown name.
  """
  kinds = kinds_of_batch(run)
  if stage is not None:
    require_known("--stage", stage, kinds)
    kinds = {stage: kinds[stage]}
  found = []
  for name, (segment, modality, length) in kinds.items():
    batch = run.abstract_batch(segment, modality, length, mesh)
    found.append((name, batch, _forward_flops(segment, modality, batch, run.model)))
  return max(found, key=lambda each: each[2])


def _forward_flops(segment: Segment, modality: str, batch: Batch, model: DualEncoderConfig) -> float:
  """Counts the FLOPs as if every row were full, and every packed image as large as it may be."""
  patches, tokens = (math.prod(side.shape[:2]) for side in (batch.image.patches, batch.text.tokens))
  inputs, longest = segment.inputs(modality), segment.caption_length(model.text.length)
  packed = inputs.resolution.mode == "native" and inputs.rows is not None
  return flops.forward_flops(
    model,
    pairs=batch.pairs,
    patches=patches,
    image_sequence=inputs.kept(inputs.resolution.max_tokens) if packed else patches // batch.pairs,
    tokens=tokens,
    text_sequence=min(longest, batch.text.tokens.shape[1]),
    frames=batch.image.patches.shape[2] // model.image.patch_dim,
  )


def compile_step(run: Run, topology: Topology, stage: str | None = None) -> Compiled:
  """Compiles the step of a run.

  Args:
    run: the run whose step is compiled.
    topology: the devices to compile for.
    stage: name of a kind of batch, as `kinds_of_batch` lists them; None is the most costly.

  Raises:
    UserError: for a mesh or a batch that does not divide over the devices, an unknown stage, or a topology whose
      compiler is not installed.
  """
  mesh = run.make_mesh(topology.devices())
  spec, step = run.build(mesh)
  state, (kind, batch, forward) = spec.abstract(), choose_batch(run, stage, mesh)
  began = time.perf_counter()
  text, memory = compile_for(topology, step, state, batch)
  return Compiled(kind, state, batch, forward, mesh, text, memory, time.perf_counter() - began)


def compile_for(topology: Topology, step: Any, *arguments: Any) -> tuple[str, dict[str, float]]:
  """Compiles a jitted function for abstract arguments with shardings on the devices of a topology.

  Returns:
    The optimised HLO, and bytes on each device by use, as the attributes of `Compiled` say.
  """
  lowered = step.lower(*arguments)
  try:
    compiled = lowered.compile(compiler_options=topology.compiler_options)
  except jax.errors.JaxRuntimeError as error:
    needed = bytes_needed(str(error), device_bytes(arguments))
    if needed is None:
      raise
    return "", needed
  sizes = compiled.memory_analysis()
  memory = {
    "arguments": float(sizes.argument_size_in_bytes),
    "outputs": float(sizes.output_size_in_bytes),
    "aliased": float(sizes.alias_size_in_bytes),
    "temporaries": float(sizes.temp_size_in_bytes),
    "code": float(sizes.generated_code_size_in_bytes),
  }
  return compiled.as_text(), memory


def bytes_needed(message: str, arguments: int) -> dict[str, float] | None:
  """Reads the memory that a step needs from the error of a compiler that ran out of it; None for other errors.

  Args:
    message: the message of the error.
    arguments: number of bytes of state and batch.
  """
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  total, temporaries = (pattern.search(message) for pattern in _NEEDED)
  if total:
    return {"arguments": float(arguments), "temporaries": float(total[1]) * _UNITS[total[2]] - arguments}
  if temporaries:
    return {"arguments": float(arguments), "temporaries": float(temporaries[1]) * _UNITS[temporaries[2]]}
  return None
