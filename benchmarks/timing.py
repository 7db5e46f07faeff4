"""Times of things that are compared: in one process, one after the other, again and again."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# A result is there before the memory that it took is back with the system, which lasts a tenth of the run for a matrix
# of logits. Without a pause that tenth would be charged to whoever runs next. As a share of the run before it:
PAUSE = 0.25


def taking_turns(functions: list[Callable[[], Any]], repeats: int) -> np.ndarray:
  """Seconds `[function, repeat, wall | processor]` of each call, after one that is not timed; a pause follows each."""
  times = np.zeros((len(functions), repeats + 1, 2))
  for repeat in range(repeats + 1):
    for index, function in enumerate(functions):
      wall, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(function())
      times[index, repeat] = time.perf_counter() - wall, time.process_time() - processor
      time.sleep(PAUSE * times[index, repeat, 0])
  return times[:, 1:]
