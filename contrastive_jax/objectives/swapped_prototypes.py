"""The term in which each tower predicts the cluster of the other's embedding."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, NOT_NEGATIVE, POSITIVE, within
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.prototypes import Earlier
from contrastive_jax.objectives import ring, steps
from contrastive_jax.objectives.term import Arrays, GlobalTerm, Pairs, Sizes, Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwappedPrototypes(GlobalTerm):
  """Each tower predicts to which prototype the other's embedding belongs (`losses.swapped_prototypes_loss`).

  The prototypes are learned, only needed to train and no part of the model.

  Attributes:
    prototypes: number of prototypes.
    temperature: divisor of the similarities that predict.
    code_temperature: divisor of the similarities that codes are made of; the smaller, the harder the codes.
    iterations: number of rounds in which the codes are balanced.
    frozen_steps: number of steps in which the prototypes do not move: 313 at a batch of 4,096 and 5,005 at 256 for its
      authors.
    queue: number of earlier pairs that take part in the balancing, a multiple of the number of devices; 0 is none. A
      batch with fewer pairs than prototypes needs them. They are kept from one step to the next.

  SwAV (arXiv 2006.09882) across the towers, which "Improved baselines for vision-language pre-training" (arXiv
  2305.08675) calls SwALIP.
  """

  prototypes: int = within(COUNT, 3000)
  temperature: float = within(POSITIVE, 0.1)
  code_temperature: float = within(POSITIVE, 0.05)
  iterations: int = within(COUNT, 3)
  frozen_steps: int = within(NOT_NEGATIVE, 0)
  queue: int = within(NOT_NEGATIVE, 0)

  separates: ClassVar[bool] = True

  def unlearned(self, pairs: int) -> float:
    return math.log(self.prototypes)

  def params(self, sizes: Sizes) -> Arrays:
    # FSDP splits them by the embeddings' features.
    return {"prototypes": Variable((self.prototypes, sizes.embed_dim), (None, "embed"), jax.random.normal)}

  def state(self, sizes: Sizes) -> Arrays:
    counted = steps.variables(self.frozen_steps)
    if not self.queue:
      return counted
    return {**counted, "queue": ring.variables(self.queue, sizes, "loss_options.swapped_prototypes.queue")}

  def __call__(self, pairs: Pairs, params, state, *, axis_name=None, **exchange: Any):
    axes = pairwise.mesh_axes(axis_name)
    prototypes, earlier = params["prototypes"], None
    after = steps.counted(state, self.frozen_steps)
    if self.frozen_steps:
      frozen = state["steps"] < self.frozen_steps
      prototypes = jnp.where(frozen, jax.lax.stop_gradient(prototypes), prototypes)
    if self.queue:
      kept = state["queue"]
      earlier = Earlier(kept["image"], kept["text"], ring.valid(kept, axes))
      after["queue"] = ring.push(kept, pairs.image, pairs.text, pairs.keys, axes)
    loss, metrics = losses.swapped_prototypes_loss(
      pairs.image,
      pairs.text,
      prototypes,
      temperature=self.temperature,
      code_temperature=self.code_temperature,
      iterations=self.iterations,
      earlier=earlier,
      axis_name=axis_name,
    )
    return loss, after, metrics
