"""The term of the distance between the two embeddings of a pair."""

import dataclasses

import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.objectives.term import ComparesTowers, LocalTerm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment(ComparesTowers, LocalTerm):
  """The mean squared distance of the embeddings of a pair, which `losses.squared_distances` computes.

  Attributes:
    towers: the towers that are compared: the first with each other one, in a sum of distances.
  """

  def total(self, model, outputs, batch, params):
    first, *others = (outputs[name].embedding for name in self.towers)
    return sum(jnp.sum(losses.squared_distances(first, other)) for other in others)

  def count(self, batch):
    return jnp.float32(batch.pairs)
