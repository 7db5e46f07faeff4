"""Searches for the largest global batch that fits, and for what the backward pass should keep."""

import copy
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.planning.compiling import kinds_of_batch
from contrastive_jax.training.run import Run

# Bisection stops when the largest known fit and the smallest known misfit differ by less than this share.
GRANULARITY = 1 / 8
# Values of `model.*.transformer.remat` that are tried, each of which keeps more than the one before.
REMATS = ("full", "mlp+mix", "qkv+mix+stream+mlp", "none")
Attempt = Callable[[int], dict[str, Any]]


def batch_to_search(config: ConfigDict, stage: str | None, shards: int) -> tuple[int, int, Callable[[int], Any]]:
  """Returns the smallest batch size that divides, the config's own, and a function that sets another in the config.

  A stage of the curriculum that sets `batch_size` itself does not follow that of the run: its own is searched.

  Args:
    config: the config of the run.
    stage: name of the kind of batch that is planned, as `kinds_of_batch` lists them; None is the most costly.
    shards: number of devices that each hold a part of the batch.

  Raises:
    UserError: for an unknown stage, or none where stages set their batch themselves.
  """
  unit = shards * config.accumulation * max(1, config.data.pack_pairs)
  run = Run.from_config(config)
  own = {k: each for k, each in enumerate(run.stages) if each.batch_size}
  if stage is None:
    for k, each in own.items():
      raise UserError(
        f"--find_max_batch changes batch_size, and stage '{each.name}' has its own,"
        f" curriculum.{k}.batch_size={each.batch_size}: name the stage to search with --stage"
      )
    name = None
  else:
    kinds = kinds_of_batch(run)
    require_known("--stage", stage, kinds)
    name = kinds[stage][0].name
  number = next((k for k, each in own.items() if each.name == name), None)

  def with_batch(batch_size: int) -> Any:
    changed = copy.deepcopy(config)
    if number is None:
      changed.batch_size = batch_size
    else:
      changed.curriculum[number]["batch_size"] = batch_size
    return changed

  return unit, config.batch_size if number is None else own[number].batch_size, with_batch


def find_max_batch(attempt: Attempt, unit: int, start: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Doubles or halves from near `start` until the answer lies between two powers of two, then bisects.

  Args:
    attempt: a function that makes the plan of a batch size.
    unit: the number of which all batch sizes are multiples.
    start: the batch size to begin near.

  Returns:
    The plan of the largest batch found, and `{"batch_size", "fits", "peak_bytes"}` of each attempt, in order.

  Raises:
    UserError: if not even one unit fits.
  """
  tried: list[dict[str, Any]] = []
  plans: dict[int, dict[str, Any]] = {}

  def fits(multiple: int) -> bool:
    plan = plans[multiple] = attempt(multiple * unit)
    memory = plan["memory"]
    tried.append({"batch_size": multiple * unit, "fits": memory["fits"], "peak_bytes": memory["peak_bytes"]})
    return memory["fits"]

  good, bad = 0, None
  multiple = 1 << max(0, (start // unit).bit_length() - 1)
  while bad is None or not good:
    if fits(multiple):
      good = multiple
      multiple = 2 * good
    else:
      bad = multiple
      multiple = bad // 2
      if not multiple:
        raise UserError(f"batch_size={unit}, the smallest that divides over the devices, does not fit: {_advice()}")
  while (bad - good) > max(1, good * GRANULARITY):
    middle = (good + bad) // 2
    if fits(middle):
      good = middle
    else:
      bad = middle
  return plans[good], tried


def with_remat(config: ConfigDict, remat: str, *, looped: bool) -> ConfigDict:
  """Returns a config whose towers keep what `remat` says, and run their blocks in a loop or one after the other."""
  changed = copy.deepcopy(config)
  for tower in ("image", "text"):
    blocks = changed.model[tower].transformer
    blocks.remat = remat
    blocks.unroll = 1 if looped else blocks.depth
  return changed


def find_remat(attempt: Callable[[str, bool], dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Tries what the backward pass may keep, with and without a loop over depth, as long as it fits.

  Args:
    attempt: a function that makes the plan of a value of `remat`, looped or not.

  Returns:
    The plan of the fastest step that fits, and `{"remat", "looped", "fits", "peak_bytes", "compile_seconds"}` of each
    attempt, with "step_seconds" where there is a program, in order.

  Raises:
    UserError: if nothing fits.
  """
  tried: list[dict[str, Any]] = []
  fitting: list[dict[str, Any]] = []
  for looped in (True, False):
    for remat in REMATS:
      plan = attempt(remat, looped)
      memory = plan["memory"]
      found = {"remat": remat, "looped": looped, "fits": memory["fits"], "peak_bytes": memory["peak_bytes"]}
      if "time" in plan:
        found["step_seconds"] = plan["time"]["step_seconds"]
      tried.append({**found, "compile_seconds": plan["compile_seconds"]})
      if not memory["fits"]:
        break
      fitting.append(plan)
  if not fitting:
    raise UserError(f"the step does not fit, whatever is computed again: lower batch_size, {_advice()}")
  return min(fitting, key=lambda plan: plan["time"]["step_seconds"]), tried


def _advice() -> str:
  return "raise mesh.fsdp, or use more devices"
