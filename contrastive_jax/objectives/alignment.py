"""The term of the distance between the two embeddings of a pair."""

import dataclasses
from typing import ClassVar

from contrastive_jax import losses
from contrastive_jax.objectives.term import ComparesTowers, LocalTerm, count_of_pairs, sum_of_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment(ComparesTowers, LocalTerm):
  """The mean squared distance of the embeddings of a pair, which `losses.squared_distances` computes.

  Attributes:
    towers: the towers that are compared: the first with each other one, in a sum of distances.
  """

  leaves_out: ClassVar[bool] = True

  def total(self, model, outputs, batch, params):
    first, *others = (outputs[name].embedding for name in self.towers)
    return sum(sum_of_pairs(losses.squared_distances(first, other), batch) for other in others)

  def count(self, batch):
    return count_of_pairs(batch)
