"""Columns beside a caption: how much a pair counts, and captions that are wrong for the picture."""

import math
from typing import Any

from contrastive_jax.preprocess.decoding import DecodeError


def weight_of(value: Any, column: str) -> float:
  """Returns the weight of a pair, of a column that may hold text as all columns of CSV do.

  Raises:
    DecodeError: if it is no number, or below 0.

  Examples:
    >>> weight_of("0.5", "quality")
    0.5
  """
  try:
    weight = math.nan if value is None or isinstance(value, bool) else float(value)
  except (TypeError, ValueError):
    weight = math.nan
  if not 0 <= weight < math.inf:
    raise DecodeError(f"its {column} {value!r} is no weight, which is a number of at least 0")
  return weight
