"""Ranges of numbers, which the fields of a config have and the options of a term state beside themselves."""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Range:
  """The range of a finite number.

  Attributes:
    least: the smallest value.
    most: the largest value.
    above: excludes `least` itself.
    below: excludes `most` itself.
  """

  least: float | int = -math.inf
  most: float | int = math.inf
  above: bool = False
  below: bool = False

  def holds(self, value: float | int) -> bool:
    """Says whether a number is finite and within the range, also as the float32 that a train step computes with.

    A decay of 0.99999999 is 1 there, and an eps of 1e-60 is 0.
    """
    return self.contains(value) and (isinstance(value, int) or self.contains(as_float32(value)))

  def contains(self, value: float | int) -> bool:
    """Says whether a number is finite and within the range."""
    low = value > self.least if self.above else value >= self.least
    high = value < self.most if self.below else value <= self.most
    return math.isfinite(value) and low and high

  def __str__(self) -> str:
    low = f"{'above' if self.above else 'at least'} {_written(self.least)}" if math.isfinite(self.least) else ""
    high = f"{'below' if self.below else 'at most'} {_written(self.most)}" if math.isfinite(self.most) else ""
    return " and ".join(part for part in (low, high) if part) or "finite"


def _written(bound: float | int) -> str:
  return str(bound) if isinstance(bound, int) else f"{bound:g}"


def as_float32(value: float) -> float:
  """Returns the number that a train step computes with."""
  with np.errstate(over="ignore", under="ignore"):
    return float(np.float32(value))


FINITE = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
COUNT = Range(1)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, below=True)
DEGREES = Range(0, 360)


def within(limits: Range, default: Any) -> Any:
  """Returns a field of a dataclass whose numbers lie in a range.

  Args:
    limits: the range.
    default: the default of the field, which may be None.
  """
  return dataclasses.field(default=default, metadata={"range": limits})
