"""The factors that stages give the learning rate and the distillation terms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import stage
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import make_objective
from contrastive_jax.schedule.stages import Stage
from contrastive_jax.training.run import Run
from contrastive_jax.training.stage_factors import learning_rate, term_factors
from tests import tiny

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


def test_terms_that_distil_fall_within_their_stage():
  objective = make_objective({"softmax": 1.0, "distill_features": 2.0}, {})
  factors = jax.vmap(term_factors(STAGES, objective))(jnp.arange(100))
  assert factors.keys() == {"distill_features"}
  expected = np.concatenate([np.ones(70), 0.5 * (1 - np.arange(30) / 30)])
  np.testing.assert_allclose(factors["distill_features"], expected, atol=1e-6)


def test_weights_of_terms_change_within_a_stage():
  stages = (
    Stage("one", 10, weights={"alignment": (0.0, 2.0)}),
    Stage("two", 10, weights={"alignment": 3, "distill_features": (1.0, 0.5)}, distillation=(0.0, 1.0)),
    Stage("three", 10),
  )
  objective = make_objective({"softmax": 1.0, "alignment": 0.1, "distill_features": 1.0}, {})
  factors = jax.vmap(term_factors(stages, objective))(jnp.arange(30))
  assert factors.keys() == {"alignment", "distill_features"}
  done = np.arange(10) / 10
  ones = np.ones(10)
  np.testing.assert_allclose(factors["alignment"], np.concatenate([2 * done, 3 * ones, ones]), atol=1e-6)
  both = np.concatenate([ones, (1 - 0.5 * done) * done, ones])
  np.testing.assert_allclose(factors["distill_features"], both, atol=1e-6)


def test_without_stages_nothing_is_multiplied():
  assert term_factors((Stage("", 10),), make_objective({"softmax": 1.0, "alignment": 0.1}, {})) is None


@pytest.mark.parametrize(
  ("weights", "said"),
  [
    ({"alignmnet": 1.0}, "did you mean 'alignment'"),
    ({"sigmoid": 1.0}, r"curriculum\.0\.weights"),
    ({"alignment": -1.0}, r"curriculum\.0\.weights\.alignment"),
    ({"alignment": (0.0, float("inf"))}, r"curriculum\.0\.weights\.alignment"),
    ({"alignment": (1.0, 2.0, 3.0)}, "give it a number, or two"),
    ({"alignment": "half"}, "give it a number, or two|weights"),
    ({"softmax": (0.0, 0.0)}, "nothing else keeps embeddings apart"),
  ],
)
def test_weights_that_cannot_work_are_named(weights, said):
  config = tiny.get_config()
  config.objective.softmax, config.objective.alignment = 1.0, 0.1
  config.curriculum = (stage("only", 0, weights=weights),)
  with pytest.raises(UserError, match=said):
    Run.from_config(config)


def test_ends_of_a_weight_are_the_same_in_a_config_and_in_its_json():
  config = tiny.get_config()
  config.objective.softmax, config.objective.alignment = 1.0, 0.1
  config.curriculum = (stage("first", 10, weights={"alignment": (0.0, 1.0)}), stage("second", 0))
  stored = Run.from_config(config).as_json()["curriculum"][0]["weights"]
  assert stored == {"alignment": [0.0, 1.0]}
  assert Stage(weights=stored).ends_of_weight("alignment") == (0.0, 1.0)
