"""The plan of a run: what one step of a config needs and costs on a topology, as a JSON-able dictionary."""

import math
from typing import Any

import jax

from contrastive_jax.models import flops
from contrastive_jax.planning import costs, hlo
from contrastive_jax.planning.compiling import Compiled, compile_step, device_bytes
from contrastive_jax.planning.topologies import Chip, Topology
from contrastive_jax.training import config as run_config

# A cycle is what the TPU compiler expects of each kernel. It says nothing of the sort for GPUs.
CYCLES = "the compiler's cycles of every kernel"
ROOFLINE = "of every kernel the longer of its arithmetic at peak and its memory traffic at full bandwidth"


def make_plan(config: Any, topology: Topology, *, memory: float | None = None) -> tuple[dict[str, Any], Compiled]:
  """Compiles a config's step and reads off what it takes.

  Args:
    config: of the run, not yet checked.
    topology: to compile for.
    memory: bytes of a device, if not the chip's.

  Returns:
    The plan (fields in docs/scaling.md) and what it was read from.

  Raises:
    UserError: see `config.check`, `config.build` and `Topology.devices`.
  """
  run_config.check(config)
  compiled = compile_step(config, topology)
  plan = {
    "config": config.name,
    "topology": topology.name,
    "chip": topology.chip.name,
    "devices": topology.device_count,
    "mesh": dict(compiled.mesh.shape),
    "batch_size": config.batch_size,
    "accumulation": config.accumulation,
    "objective": run_config.term_weights(config),
    "compute_dtype": config.compute_dtype,
    "remat": {name: config.model[name].transformer.remat for name in ("vision", "text")},
    "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(compiled.state.params)),
    "parameter_bytes": device_bytes(compiled.state.params),
    "optimizer_bytes": device_bytes(compiled.state.slots),
    "memory": _memory(compiled, topology.chip, memory),
    "compile_seconds": compiled.seconds,
  }
  if compiled.text:
    plan.update(_costs(config, topology, compiled.text))
  return plan, compiled


def _memory(compiled: Compiled, chip: Chip, memory: float | None) -> dict[str, Any]:
  has = chip.memory if memory is None else memory
  free = has - chip.reserve - compiled.peak
  known = {"fits": free >= 0, "headroom_bytes": free} if has else {"fits": None, "headroom_bytes": None}
  parts = {f"{use}_bytes": amount for use, amount in compiled.memory.items()}
  return {**known, "peak_bytes": compiled.peak, "chip_bytes": has or None, "reserve_bytes": chip.reserve, **parts}


def _costs(config: Any, topology: Topology, text: str) -> dict[str, Any]:
  found = costs.analyse(hlo.parse(text), topology.link)
  model_flops = 3 * config.batch_size * flops.forward_flops_per_pair(run_config.model_config(config))
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
    "time": _time(config, topology, found, model_flops),
  }


def _time(config: Any, topology: Topology, found: costs.Costs, model_flops: float) -> dict[str, Any]:
  """How fast a step can be at best: sending hides behind computing, or the other way round."""
  chip = topology.chip
  if not chip.flops:
    return {"estimate": None}
  if chip.clock:
    source, computing = CYCLES, found.cycles / chip.clock
  else:
    source = ROOFLINE
    computing = sum(k.runs * max(k.flops / chip.flops, k.bytes / chip.bandwidth) for k in found.kernels)
  sending = sum(sent.seconds for sent in found.collectives)
  step = max(computing, sending)
  return {
    "estimate": source,
    "computing_seconds": computing,
    "sending_seconds": sending,
    "step_seconds": step,
    "pairs_per_second": config.batch_size / step,
    "mfu_bound": model_flops / (topology.device_count * chip.flops * step),
  }
