"""What a run costs at best: the pairs, the hours and the chip-hours of its stages, from steps that were planned."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

# What the bound on the time of a step leaves out, and what happens between steps.
LEFT_OUT = "without waiting for data, evaluations, checkpoints, restarts, and whatever a step takes beyond its bound"


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a run that have one kind of batch.

  Attributes:
    stage: name of the kind of batch, as `compiling.kinds_of_batch` lists them.
    steps: number of its steps; of lengths that are drawn for each batch, the number that is expected.
    batch_size: number of pairs of a step.
    step_seconds: duration of a step at best; None where it is not known.
  """

  stage: str
  steps: int | float
  batch_size: int
  step_seconds: float | None


def cost(every: Sequence[Steps], devices: int, price: float | None = None) -> dict[str, Any]:
  """Adds up what steps cost.

  Args:
    every: the steps, by kind of batch.
    devices: number of devices.
    price: price of an hour of a device, in any currency; None asks for none.

  Returns:
    A dictionary that JSON can hold: `stages`, with the name `stage`, and `total`, each of them with `steps`, `pairs`,
    `hours`, `chip_hours` and, where there is a price, `price`; and the `chip_hour_price`. Hours are None where the
    duration of some step is not known.

  Examples:
    >>> cost([Steps("a", 1000, 64, 3.6), Steps("b", 500, 32, 7.2)], devices=4, price=2.0)["total"]
    {'steps': 1500, 'pairs': 80000, 'hours': 2.0, 'chip_hours': 8.0, 'price': 16.0}
  """

  def row(steps: int | float, pairs: int | float, hours: float | None) -> dict[str, Any]:
    known = hours is not None
    found = {"steps": steps, "pairs": pairs, "hours": hours, "chip_hours": hours * devices if known else None}
    return found if price is None else {**found, "price": found["chip_hours"] * price if known else None}

  stages = [
    {
      "stage": one.stage,
      **row(
        one.steps,
        one.steps * one.batch_size,
        None if one.step_seconds is None else one.steps * one.step_seconds / 3600,
      ),
    }
    for one in every
  ]
  hours = [stage["hours"] for stage in stages]
  total = row(
    sum(stage["steps"] for stage in stages),
    sum(stage["pairs"] for stage in stages),
    None if None in hours else math.fsum(hours),
  )
  return {"chip_hour_price": price, "stages": stages, "total": total}
