"""Compiles a config's train step for hardware that this machine does not have: does it fit, and what does it cost?

python plan.py --config=configs/siglip_b16.py --topology=v5e:16x16 [--config.batch_size=65536 ...] [--output=FILE]
"""

import os

# Before JAX starts: the compilers need no device, and looking for one takes minutes and complains.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Several plans at a time.

import json
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.planning import report, topologies
from contrastive_jax.planning.plan import make_plan
from contrastive_jax.planning.search import batch_to_search, find_max_batch, find_remat, with_remat
from contrastive_jax.planning.topologies import Topology

CONFIG = cli.define_config("What to plan, such as configs/siglip_b16.py.")
TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Devices to compile for: v5e:16x16, v5p:4x4x8, v6e:16x16 (TPU slices), h100:8, h100:4x8 (hosts x GPUs) or cpu:8.",
)
OUTPUT = flags.DEFINE_string("output", None, "File that also gets the plan, as JSON.")
MEMORY = flags.DEFINE_float(
  "memory", None, "Memory of a device in GiB, where it differs from the chip's data sheet.", lower_bound=0.0
)
FIND_MAX_BATCH = flags.DEFINE_bool(
  "find_max_batch", False, "Search for the largest batch_size that fits, or with --stage that of a stage."
)
FIND_REMAT = flags.DEFINE_bool(
  "find_remat",
  False,
  "Search for what the backward pass should keep and for whether to loop over depth.",
)
STAGE = flags.DEFINE_string(
  "stage",
  None,
  "Stage of a curriculum to plan, by its name; NAME/clip plans its steps on clips. The most costly one if not given.",
)
KERNELS = flags.DEFINE_integer(
  "kernels", 0, "Number of kernels to list, those that take the most time, by where they come from.", lower_bound=0
)
SAVE_HLO = flags.DEFINE_string("save_hlo", None, "File that also gets the optimised HLO of the step.")


def main() -> None:
  config = cli.config_value(CONFIG)
  if not TOPOLOGY.value:
    raise UserError(f"--topology is missing: name one such as {', '.join(topologies.FORMS)}")
  topology = topologies.find(TOPOLOGY.value)
  if KERNELS.value and not topology.chip.flops:
    raise UserError(f"--kernels={KERNELS.value} needs a chip whose times are known: {topology.name} has none")
  output = paths.file_to_write("--output", OUTPUT.value) if OUTPUT.value else None
  if SAVE_HLO.value:
    paths.file_to_write("--save-hlo", SAVE_HLO.value)
  console = Console()
  if FIND_MAX_BATCH.value and FIND_REMAT.value:
    raise UserError("--find_max_batch and --find_remat are two searches: choose one")
  find = search if FIND_MAX_BATCH.value else search_remat if FIND_REMAT.value else attempt
  plan = find(config, topology, console)
  console.print(report.render(plan))
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(plan, indent=2) + "\n")


def attempt(config: ConfigDict, topology: Topology, console: Console) -> dict[str, Any]:
  """The plan of a config, with a sign of life while it compiles."""
  memory = None if MEMORY.value is None else MEMORY.value * topologies.GIB
  waiting = f"Compiling {config.name} for {topology.name}: seconds to a few minutes"
  if not console.is_terminal:
    console.print(waiting)
  with console.status(waiting):
    plan, compiled = make_plan(config, topology, memory=memory, stage=STAGE.value, dearest=KERNELS.value)
  if SAVE_HLO.value and compiled.text:
    path = paths.typed("--save-hlo", SAVE_HLO.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compiled.text)
  return plan


def search(config: ConfigDict, topology: Topology, console: Console) -> dict[str, Any]:
  """The plan of the largest batch that fits, with all that was tried."""
  if not (MEMORY.value or topology.chip.memory):
    raise UserError(f"--find_max_batch needs to know the memory of {topology.name}: say it with --memory=GIB")
  data, fsdp, _ = MeshSpec(**config.mesh).sizes(topology.device_count)
  unit, start, with_batch = batch_to_search(config, STAGE.value, data * fsdp)

  def plan_of(batch_size: int) -> dict[str, Any]:
    plan = attempt(with_batch(batch_size), topology, console)
    console.print(f"batch {batch_size:,}: {report.verdict(plan['memory'])}")
    return plan

  plan, tried = find_max_batch(plan_of, unit, start)
  return {**plan, "tried": tried}


def search_remat(config: ConfigDict, topology: Topology, console: Console) -> dict[str, Any]:
  """The plan of the fastest way to run the blocks that fits, with all that was tried."""
  if not (topology.chip.flops and (MEMORY.value or topology.chip.memory)):
    raise UserError(f"--find_remat needs a chip whose memory and times are known: {topology.name} has none")

  def plan_of(remat: str, looped: bool) -> dict[str, Any]:
    plan = attempt(with_remat(config, remat, looped=looped), topology, console)
    taken = f", {1e3 * plan['time']['step_seconds']:.0f} ms" if "time" in plan else ""
    way = f"remat='{remat}', {'a loop over depth' if looped else 'no loop'}"
    console.print(f"{way}: {report.verdict(plan['memory'])}{taken}, compiled in {plan['compile_seconds']:.0f} s")
    return plan

  plan, tried = find_remat(plan_of)
  return {**plan, "tried": tried}


if __name__ == "__main__":
  cli.run(main)
