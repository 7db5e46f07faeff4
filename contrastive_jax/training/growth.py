"""The learning rate of a run whose `total_steps` grows.

A checkpoint records how many steps the run was planned for, and how each growth was to be met. The rate of a step is a
function of that record and the config alone, so that a run which is stopped and resumed sees the same rates.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from contrastive_jax.errors import UserError
from contrastive_jax.training.optimizer import Schedule

# "hold" keeps the final rate over the steps that are added, "restart" repeats warm-up and decay over them, "stretch"
# spreads the schedule over all steps as if they had been planned from the beginning.
WAYS = ("hold", "restart", "stretch")
DEFAULT = "hold"


@dataclasses.dataclass(frozen=True)
class Growth:
  """The number of steps that a run was planned for at some time.

  Attributes:
    total_steps: number of steps of the whole run.
    way: how these steps follow those of the plan before, one of `WAYS`; without meaning for the first plan.
  """

  total_steps: int
  way: str = DEFAULT


Growths = Sequence[Growth]


def read(metadata: Mapping[str, Any], planned: int, total_steps: int, way: str) -> tuple[Growth, ...]:
  """Returns the plans of a run that is started or resumed.

  Args:
    metadata: what a checkpoint holds beside its arrays; those of older versions say nothing of plans.
    planned: number of steps of the checkpoint's segments, which is what older versions stretched the schedule over.
    total_steps: of the config.
    way: `schedule.on_growth` of the config.
  """
  plans = tuple(Growth(**plan) for plan in metadata.get("plans", ())) or (Growth(planned or total_steps),)
  return (*plans, Growth(total_steps, way)) if total_steps > plans[-1].total_steps else plans


def grown(over: Callable[[int], Schedule], growths: Growths) -> Schedule:
  """Makes the learning rate of each step of a run that has grown.

  Args:
    over: a function that makes the schedule of a number of steps.
    growths: the plans of the run, at least one.

  Raises:
    UserError: if the phases of the schedule do not fit into the steps that are added.
  """
  schedule = over(growths[0].total_steps)
  for before, plan in itertools.pairwise(growths):
    if plan.way == "stretch":
      schedule = over(plan.total_steps)
    elif plan.way == "hold":
      schedule = _followed(schedule, before.total_steps, None)
    else:
      try:
        added = over(plan.total_steps - before.total_steps)
      except UserError as error:
        raise UserError(
          f"schedule.on_growth='restart' repeats the schedule over the {plan.total_steps - before.total_steps} steps"
          f" that are added to {before.total_steps}: {error}"
        ) from None
      schedule = _followed(schedule, before.total_steps, added)
  return schedule


def _followed(first: Schedule, end: int, then: Schedule | None) -> Schedule:
  """Makes one schedule up to a step, and from there on another, which counts from 0; None holds the last rate."""

  def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
    step = jnp.asarray(step)
    within = first(jnp.minimum(step, end))
    return within if then is None else jnp.where(step < end, within, then(jnp.maximum(step - end, 0)))

  return rate


def announced(schedule: Callable[[Growths], Schedule], growths: Growths, start: int) -> str:
  """Makes a sentence about the last growth of a run, with the rates before and after.

  Args:
    schedule: a function that makes the schedule of some plans.
    growths: the plans of the run, at least two.
    start: number of steps that are done.

  Raises:
    UserError: if the rate would be held at 0.
  """
  (before, plan), old, new = growths[-2:], schedule(growths[:-1]), schedule(growths)
  first = start if plan.way == "stretch" else before.total_steps
  rates = [float(rate) for rate in (old(max(first - 1, 0)), new(first))]
  if plan.way == "hold" and rates[1] == 0:
    raise UserError(
      f"total_steps grew from {before.total_steps} to {plan.total_steps}, and the learning rate ends at 0: set"
      " schedule.on_growth='restart' for another warm-up and decay over the added steps, or 'stretch' to spread the"
      " schedule over all steps"
    )
  highest = float(jnp.max(jax.vmap(new)(jnp.linspace(first, plan.total_steps - 1, 1000).astype(jnp.int32))))
  return (
    f"total_steps grew from {before.total_steps} to {plan.total_steps} with schedule.on_growth='{plan.way}': the"
    f" learning rate is {rates[0]:.2g} in step {max(first, 1)} and {rates[1]:.2g} in step {first + 1}, and at most"
    f" {highest:.2g} from there on."
  )
