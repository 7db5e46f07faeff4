"""The factors that stages give the learning rate and the distillation terms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_jax.schedule.stages import Stage
from contrastive_jax.training.stage_factors import distillation_weight, learning_rate

STAGES = (
  Stage("fixed", 40),
  Stage("native", 30, learning_rate=0.5, warmup_steps=10),
  Stage("video", 30, distillation=(0.5, 0.0)),
)


def test_each_stage_has_its_factor_and_warm_up_of_the_learning_rate():
  schedule = learning_rate(optax.constant_schedule(2.0), STAGES)
  rates = jax.vmap(schedule)(jnp.arange(100))
  warm = np.minimum(1, np.arange(1, 31) / 10)
  np.testing.assert_allclose(rates, np.concatenate([np.full(40, 2.0), 2 * 0.5 * warm, np.full(30, 2.0)]), rtol=1e-6)


def test_the_distillation_weight_falls_within_its_stage():
  weight = jax.vmap(distillation_weight(STAGES))(jnp.arange(100))
  np.testing.assert_allclose(weight, np.concatenate([np.ones(70), 0.5 * (1 - np.arange(30) / 30)]), atol=1e-6)
