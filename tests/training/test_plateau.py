"""A loss that stays where nothing is learned is said once, and what that value is of each loss."""

import jax.numpy as jnp
import pytest
from scipy.optimize import minimize_scalar

from contrastive_jax import losses
from contrastive_jax.objectives import make_objective
from contrastive_jax.training.plateau import STEPS, Plateau


def test_the_value_where_nothing_is_learned_is_that_of_equal_embeddings():
  same = jnp.ones((32, 1))
  of = {name: make_objective({name: 1.0}, {}).unlearned(32)["loss"] for name in ("softmax", "sigmoid")}
  assert losses.softmax_loss(same, same, logit_scale=1.0)[0] == pytest.approx(of["softmax"], rel=1e-6)

  def at(bias):
    return float(losses.sigmoid_loss(same, same, logit_scale=0.0, logit_bias=bias)[0])

  assert minimize_scalar(at, bounds=(-10, 0), method="bounded").fun == pytest.approx(of["sigmoid"], rel=1e-5)
  both = make_objective({"softmax": 2.0, "swapped_prototypes": 1.0, "uniformity": 1.0}, {})
  assert both.unlearned(32) == pytest.approx(
    {"loss_softmax": of["softmax"], "loss_swapped_prototypes": 8.00637}, rel=1e-5
  )


def test_a_loss_is_said_once_when_it_has_stayed_there():
  plateau = Plateau(lambda pairs: {"loss": 3.0})
  said = [plateau.note(step, {"loss": 3.02}, 8) for step in range(1, STEPS)]
  assert not any(said)
  assert plateau.note(STEPS, {"loss": 2.9}, 8) == []  # It moved, and the count begins anew.
  said = [plateau.note(STEPS + step, {"loss": 3.0}, 8) for step in range(1, 3 * STEPS)]
  assert [step for step, sentences in enumerate(said, 1) if sentences] == [STEPS]
  (sentence,) = said[STEPS - 1]
  assert sentence.startswith(f"Step {2 * STEPS}: for {STEPS} steps loss has been near 3") and "\n" not in sentence
