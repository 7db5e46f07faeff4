"""The term of the distance between the two embeddings of a pair."""

import dataclasses

import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.objectives.term import LocalTerm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment(LocalTerm):
  """The mean squared distance of the two embeddings of a pair, which `losses.squared_distances` computes."""

  def total(self, model, outputs, batch, params):
    return jnp.sum(losses.squared_distances(outputs["image"].embedding, outputs["text"].embedding))

  def count(self, batch):
    return jnp.float32(batch.pairs)
