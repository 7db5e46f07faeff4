"""The plan of a run: the needs and costs of one step on a topology, as a dictionary that JSON can hold."""

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from contrastive_jax.planning import costs, hlo, kernels
from contrastive_jax.planning.compiling import Compiled, compile_step, device_bytes, steps_of
from contrastive_jax.planning.run_costs import Steps
from contrastive_jax.planning.topologies import Chip, Topology
from contrastive_jax.training.run import Run

# A cycle is what the TPU compiler expects of each of its kernels. It says nothing of the sort for GPUs.
CYCLES = "the compiler's cycles of every kernel; of hand-written ones their arithmetic and traffic"
ROOFLINE = "of every kernel the longer of its arithmetic at peak and its memory traffic at full bandwidth"


def make_plan(
  config: ConfigDict,
  topology: Topology,
  *,
  memory: float | None = None,
  stage: str | None = None,
  dearest: int = 0,
) -> tuple[dict[str, Any], Compiled]:
  """Compiles a config's step and reads its needs and costs off the result.

  Args:
    config: the config of the run, not yet checked.
    topology: the devices to compile for.
    memory: bytes of memory of a device, if not the chip's.
    stage: name of a kind of batch, as `compiling.kinds_of_batch` lists them; None is the most costly one.
    dearest: number of kernels to list, by the time that they take.

  Returns:
    The plan, whose fields docs/scaling.md explains, and the compiled step that it was read from.

  Raises:
    UserError: for a config that cannot work, a batch that does not divide over the devices, or a topology whose
      compiler is not installed.
  """
  run = Run.from_config(config)
  compiled, config = compile_step(run, topology, stage), run.config
  plan = {
    "config": config.name,
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": topology.device_count,
    "mesh": dict(compiled.mesh.shape),
    "stage": compiled.kind or None,
    "steps": steps_of(run, compiled.kind),
    "batch_size": compiled.batch.pairs,
    "image_rows": list(compiled.batch.image.patches.shape[:2]),
    "accumulation": config.accumulation,
    "objective": run.term_weights,
    "compute_dtype": config.compute_dtype,
    "remat": {name: config.model[name].transformer.remat for name in ("image", "text")},
    "unroll": {name: config.model[name].transformer.unroll for name in ("image", "text")},
    "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(compiled.state.params)),
    "parameter_bytes": device_bytes(compiled.state.params),
    "optimizer_bytes": device_bytes(compiled.state.opt_state),
    "memory": _memory(compiled, topology.chip, memory),
    "compile_seconds": compiled.seconds,
  }
  if compiled.text:
    plan.update(_costs(topology, compiled, dearest))
  return plan, compiled


def steps_in(plan: dict[str, Any]) -> Steps:
  """Returns the steps that a plan is made for, with their duration where the plan knows it."""
  seconds = plan.get("time", {}).get("step_seconds")
  return Steps(plan["stage"] or plan["config"], plan["steps"], plan["batch_size"], seconds)


def _memory(compiled: Compiled, chip: Chip, memory: float | None) -> dict[str, Any]:
  has = chip.memory if memory is None else memory
  free = has - chip.reserve - compiled.peak
  known = {"fits": free >= 0, "headroom_bytes": free} if has else {"fits": None, "headroom_bytes": None}
  parts = {f"{use}_bytes": amount for use, amount in compiled.memory.items()}
  return {**known, "peak_bytes": compiled.peak, "chip_bytes": has or None, "reserve_bytes": chip.reserve, **parts}


def _costs(topology: Topology, compiled: Compiled, dearest: int) -> dict[str, Any]:
  found = costs.analyse(hlo.parse(compiled.text), topology.link)
  # A backward pass costs two forward passes.
  model_flops = 3 * compiled.forward_flops
  compiled_flops = topology.device_count * sum(found.flops.values())
  return {
    "flops": {
      "model": model_flops,
      "compiled": compiled_flops,
      "compiled_over_model": compiled_flops / model_flops,
      "by_part": {part: topology.device_count * found.flops.get(part, 0.0) for part in costs.PARTS},
      "by_dtype": {
        f"{part} {dtype}": topology.device_count * amount
        for (part, dtype), amount in sorted(found.flops_by_dtype.items())
      },
    },
    "collectives": [
      {
        "kind": sent.kind,
        "part": sent.part,
        "count": sent.count,
        "bytes": sent.bytes,
        "largest_bytes": sent.largest,
        "seconds": sent.seconds,
      }
      for sent in found.collectives
    ],
    "kernels_not_counted": found.not_counted,
    "time": _time(compiled.batch.pairs, topology, found, model_flops),
    "kernels": kernels.dearest(found, topology.chip, dearest) if topology.chip.flops else [],
  }


def _time(pairs: int, topology: Topology, found: costs.Costs, model_flops: float) -> dict[str, Any]:
  """Computes how fast a step can be at best, when sending hides behind computing, or the other way round."""
  chip = topology.chip
  if not chip.flops:
    return {"estimate": None}
  computing = kernels.computing_seconds(found, chip)
  sending = sum(sent.seconds for sent in found.collectives)
  step = max(computing, sending)
  return {
    "estimate": CYCLES if chip.clock else ROOFLINE,
    "computing_seconds": computing,
    "computing_shares": kernels.shares(found, chip),
    "sending_seconds": sending,
    "step_seconds": step,
    "pairs_per_second": pairs / step,
    "mfu_bound": model_flops / (topology.device_count * chip.flops * step),
  }
