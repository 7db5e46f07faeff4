"""Factors by which the stages of a run change its learning rate and the weights of its terms."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.objectives import Objective
from contrastive_jax.schedule.stages import Stage, first_steps
from contrastive_jax.training.optimizer import Schedule


def learning_rate(schedule: Schedule, stages: Sequence[Stage]) -> Schedule:
  """Returns the schedule with each stage's factor and warm-up."""
  if all(stage.learning_rate == 1 and not stage.warmup_steps for stage in stages):
    return schedule
  # In NumPy: a config is checked before JAX starts, and its schedule is a part of that.
  first = np.array([before for _, before in first_steps(stages)], np.int32)
  factors = np.array([stage.learning_rate for stage in stages], np.float32)
  warmups = np.array([stage.warmup_steps for stage in stages], np.float32)

  def scaled(step: Int[Array, ""] | int) -> Float[Array, ""]:
    at = _stage_at(first, step)
    begin, factor, warmup = (jnp.asarray(each)[at] for each in (first, factors, warmups))
    warm = jnp.minimum(1.0, (step - begin + 1) / jnp.maximum(warmup, 1))
    return schedule(step) * factor * warm

  return scaled


def term_factors(
  stages: Sequence[Stage], objective: Objective
) -> Callable[[Int[Array, ""] | int], dict[str, Float[Array, ""]]] | None:
  """Returns the factors of the weights of terms at each step, by their names; None where no weight ever changes.

  Terms that distil always have one: a stage may lack the teacher.
  """
  named = {name for stage in stages for name in stage.weights}
  factors = {
    name: [_product(stage, name, term.distils) for stage in stages]
    for name, (_, term) in objective.terms.items()
    if term.distils or name in named
  }
  if not factors:
    return None
  first = jnp.array([before for _, before in first_steps(stages)], jnp.int32)
  steps = jnp.array([stage.steps for stage in stages], jnp.float32)
  ends = {name: jnp.array(pairs, jnp.float32) for name, pairs in factors.items()}

  def at_step(step: Int[Array, ""] | int) -> dict[str, Float[Array, ""]]:
    at = _stage_at(first, step)
    done = jnp.clip((step - first[at]) / steps[at], 0, 1)

    def between(begin: Float[Array, ""], end: Float[Array, ""]) -> Float[Array, ""]:
      return begin + done * (end - begin)

    # The factor of a term and that of all distillation are each linear, and their product is taken at the step.
    return {name: between(*pairs[at, 0]) * between(*pairs[at, 1]) for name, pairs in ends.items()}

  return at_step


def check_weights(stages: Sequence[Stage], objective: Objective) -> None:
  """Raises a `UserError` for weights of a stage that no term has, or that leave nothing to keep embeddings apart."""
  for number, stage in enumerate(stages):
    field = f"curriculum.{number}.weights"
    for name in stage.weights:
      require_known(field, name, objective.terms)
      stage.ends_of_weight(name)  # Names what is no factor.
    apart = [name for name, (_, term) in objective.terms.items() if term.separates]
    if not any(max(stage.ends_of_weight(name)) > 0 for name in apart):
      raise UserError(
        f"{field} is 0 for {' and '.join(apart)}, and nothing else keeps embeddings apart: let one be above 0"
      )


def _product(stage: Stage, name: str, distils: bool) -> tuple[tuple[float, float], tuple[float, float]]:
  return stage.ends_of_weight(name), stage.distillation if distils else (1.0, 1.0)


def _stage_at(first: Int[Array | np.ndarray, "stages"], step: Int[Array, ""] | int) -> Int[Array, ""]:
  return jnp.searchsorted(first, step, side="right") - 1
