"""Notices a loss that stays where embeddings tell nothing of the pairs."""

import collections
import math
from collections.abc import Callable, Mapping

# Steps after which a loss that has not moved is worth a sentence, and the share by which it may be off.
STEPS, SHARE = 500, 0.01


class Plateau:
  """Counts for how many steps in a row each loss has been at the value at which nothing is learned."""

  def __init__(self, unlearned: Callable[[int], Mapping[str, float]]):
    """`unlearned` returns such values of a batch of so many pairs, by the names of the metrics."""
    self._unlearned = unlearned
    self._steps: collections.Counter[str] = collections.Counter()

  def note(self, step: int, values: Mapping[str, float], pairs: int) -> list[str]:
    """Notes the metrics of a step, and returns a sentence of each loss that has been there for `STEPS` steps now."""
    found = []
    for name, value in self._unlearned(pairs).items():
      there = abs(values.get(name, math.inf) - value) <= SHARE * value
      self._steps[name] = self._steps[name] + 1 if there else 0
      if self._steps[name] == STEPS:
        found.append(
          f"Step {step}: for {STEPS} steps {name} has been near {value:.4g}, its value where embeddings tell nothing of"
          f" the {pairs:,} pairs of a batch. Lower optimizer.learning_rate or raise schedule.warmup_steps, and see"
          " whether captions belong to their images."
        )
    return found
