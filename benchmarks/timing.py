"""Times of things that are compared: in one process, one after the other, again and again."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def taking_turns(functions: list[Callable[[], Any]], repeats: int) -> np.ndarray:
  """Seconds `[function, repeat, wall | processor]` of each call, after one that is not timed."""
  times = np.zeros((len(functions), repeats + 1, 2))
  for repeat in range(repeats + 1):
    for index, function in enumerate(functions):
      wall, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(function())
      times[index, repeat] = time.perf_counter() - wall, time.process_time() - processor
  return times[:, 1:]
