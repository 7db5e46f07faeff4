"""The largest global batch that fits."""

from collections.abc import Callable
from typing import Any

from contrastive_jax.errors import UserError

# Bisection stops when the largest known fit and the smallest known misfit differ by less than this share.
GRANULARITY = 1 / 8
Attempt = Callable[[int], dict[str, Any]]


def find_max_batch(attempt: Attempt, unit: int, start: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Doubles or halves from near `start` until the answer lies between two powers of two, then bisects.

  Args:
    attempt: makes the plan of a batch size.
    unit: batch sizes are multiples of it.
    start: batch size to begin near.

  Returns:
    The plan of the largest batch found, and what was tried: `{"batch_size", "fits", "peak_bytes"}` in order.

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


def _advice() -> str:
  return "raise mesh.fsdp, or use more devices"
