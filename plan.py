"""Compiles a config's train step for hardware that this machine does not have: does it fit, and what does it cost?

python plan.py --config=configs/siglip_b16.py --topology=v5e:16x16 [--config.batch_size=65536 ...] [--output=FILE]
python plan.py --config=configs/clipa_l16.py --topology=v5e:16x16 --all_stages --price=1.20    # what the run will cost
"""

import os

# Before JAX starts: the compilers need no device, and looking for one takes minutes and complains.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.planning import report, run_costs, topologies
from contrastive_jax.planning.compiling import kinds_of_batch
from contrastive_jax.planning.plan import make_plan, steps_in
from contrastive_jax.planning.search import batch_to_search, find_max_batch, find_remat, with_remat
from contrastive_jax.planning.topologies import Topology
from contrastive_jax.training.run import Run

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
ALL_STAGES = flags.DEFINE_bool(
  "all_stages", False, "Plan every stage of a curriculum, one compilation each, and add up what the run costs."
)
PRICE = flags.DEFINE_float(
  "price", None, "Price of an hour of one chip, in any currency, to tell what the run costs at best.", lower_bound=0.0
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
  searches = {"find_max_batch": search, "find_remat": search_remat, "all_stages": all_stages}
  asked = [name for name in searches if getattr(flags.FLAGS, name)]
  if len(asked) > 1:
    raise UserError(f"--{asked[0]} and --{asked[1]} make several plans each: choose one")
  plan = searches[asked[0]](config, topology, console) if asked else attempt(config, topology, console)
  if not ALL_STAGES.value:
    plan["cost"] = run_costs.cost([steps_in(plan)], topology.device_count, PRICE.value)
    console.print(report.render(plan))
  console.print(report.render_cost(plan["cost"]))
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(plan, indent=2) + "\n")


def all_stages(config: ConfigDict, topology: Topology, console: Console) -> dict[str, Any]:
  """The plans of all kinds of batches of a run, each printed when it is made, and what all steps cost together."""
  for flag in (SAVE_HLO, STAGE):
    if flag.value:
      raise UserError(f"--{flag.name} is for one stage, and --all_stages plans all of them: leave one of the two out")
  plans = {}
  for kind in kinds_of_batch(Run.from_config(config)):
    plans[kind] = attempt(config, topology, console, kind)
    console.print(report.render(plans[kind]))
  return {
    "plans": plans,
    "cost": run_costs.cost(list(map(steps_in, plans.values())), topology.device_count, PRICE.value),
  }


def attempt(config: ConfigDict, topology: Topology, console: Console, stage: str | None = None) -> dict[str, Any]:
  """The plan of a config, with a sign of life while it compiles; `stage` stands in place of --stage."""
  stage = STAGE.value if stage is None else stage
  memory = None if MEMORY.value is None else MEMORY.value * topologies.GIB
  named = f", stage {stage}," if stage else ""
  waiting = f"Compiling {config.name}{named} for {topology.name}: seconds to a few minutes"
  if not console.is_terminal:
    console.print(waiting)
  with console.status(waiting):
    plan, compiled = make_plan(config, topology, memory=memory, stage=stage, dearest=KERNELS.value)
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
