"""Factors by which the stages of a run change its learning rate and the weight of its distillation terms."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from contrastive_jax.schedule.stages import Stage, first_steps
from contrastive_jax.training.optimizer import Schedule


def learning_rate(schedule: Schedule, stages: Sequence[Stage]) -> Schedule:
  """Returns the schedule with each stage's factor and warm-up."""
  if all(stage.learning_rate == 1 and not stage.warmup_steps for stage in stages):
    return schedule
  first = jnp.array([before for _, before in first_steps(stages)], jnp.int32)
  factors = jnp.array([stage.learning_rate for stage in stages], jnp.float32)
  warmups = jnp.array([stage.warmup_steps for stage in stages], jnp.float32)

  def scaled(step: Int[Array, ""] | int) -> Float[Array, ""]:
    at = _stage_at(first, step)
    warm = jnp.minimum(1.0, (step - first[at] + 1) / jnp.maximum(warmups[at], 1))
    return schedule(step) * factors[at] * warm

  return scaled


def distillation_weight(stages: Sequence[Stage]) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Returns the factor of the distillation terms at each step."""
  first = jnp.array([before for _, before in first_steps(stages)], jnp.int32)
  steps = jnp.array([stage.steps for stage in stages], jnp.float32)
  ends = jnp.array([stage.distillation for stage in stages], jnp.float32)

  def weight(step: Int[Array, ""] | int) -> Float[Array, ""]:
    at = _stage_at(first, step)
    done = jnp.clip((step - first[at]) / steps[at], 0, 1)
    return ends[at, 0] + done * (ends[at, 1] - ends[at, 0])

  return weight


def _stage_at(first: Int[Array, "stages"], step: Int[Array, ""] | int) -> Int[Array, ""]:
  return jnp.searchsorted(first, step, side="right") - 1
