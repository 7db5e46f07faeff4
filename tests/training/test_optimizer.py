"""Schedules against closed forms, optimisers against float64 updates, and the split into trained and frozen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.training import optimizer as optimizers


def test_cosine_warms_up_to_its_peak_and_ends_at_its_floor():
  schedule = optimizers.make_schedule("cosine", peak=2.0, total_steps=100, warmup_steps=10, end_factor=0.1)
  assert schedule(0) == pytest.approx(0.2)
  assert schedule(9) == pytest.approx(2.0)
  assert schedule(10) == pytest.approx(2.0)
  assert schedule(55) == pytest.approx(0.2 + 1.8 * 0.5)
  assert schedule(100) == pytest.approx(0.2, rel=1e-5)


def test_linear_is_straight():
  schedule = optimizers.make_schedule("linear", peak=1.0, total_steps=8, warmup_steps=0)
  np.testing.assert_allclose([schedule(step) for step in range(9)], np.linspace(1, 0, 9), atol=1e-7)


def test_rsqrt_falls_as_the_square_root_and_cools_to_zero():
  schedule = optimizers.make_schedule(
    "rsqrt", peak=1.0, total_steps=500, warmup_steps=50, timescale=100, cooldown_steps=100
  )
  assert schedule(150) == pytest.approx(math.sqrt(0.5))
  assert schedule(350) == pytest.approx(0.5, rel=0.01)
  assert schedule(400) == pytest.approx(math.sqrt(100 / 450) * 100 / 101, rel=1e-5)
  assert 0 < schedule(499) < 0.01
  assert schedule(500) == 0


def test_cooldown_is_constant_before_it_cools():
  schedule = optimizers.make_schedule("cooldown", peak=3.0, total_steps=100, warmup_steps=5, cooldown_steps=9)
  assert schedule(50) == schedule(90) == 3.0
  np.testing.assert_allclose([schedule(step) for step in range(91, 101)], 3.0 * np.linspace(0.9, 0, 10), rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"name": "cosin"}, "did you mean 'cosine'"),
    ({"name": "cosine", "warmup_steps": 101}, "schedule.warmup_steps=101"),
    ({"name": "constant", "warmup_steps": 60, "cooldown_steps": 60}, "schedule.cooldown_steps=60"),
    ({"name": "linear", "cooldown_steps": 1}, "schedule.cooldown_steps=1"),
    ({"name": "cooldown"}, "schedule.cooldown_steps"),
  ],
)
def test_impossible_schedules_name_their_field(options, named):
  with pytest.raises(UserError, match=named):
    optimizers.make_schedule(peak=1.0, total_steps=100, **options)


def options_for(name: str, **changes):
  options = common.get_config().optimizer
  options.update({"name": name, "clip_norm": 0.0, "weight_decay": 0.1, **changes})
  return options


@pytest.fixture
def params(rng):
  return {
    "image": {
      "blocks": {
        "kernel": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(3, 16)), jnp.float32),
      },
      "projection": {"kernel": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)},
    },
    "log_logit_scale": jnp.float32(2.0),
  }


@pytest.fixture
def gradients(params, rng):
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def test_decay_spares_what_has_one_dimension_in_a_layer(params):
  assert optimizers.decayed(params) == {
    "image": {"blocks": {"kernel": True, "bias": False}, "projection": {"kernel": True}},
    "log_logit_scale": False,
  }


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_two_updates_match_float64(name, params, gradients):
  rate, b1, b2, eps, decay = 0.01, 0.9, 0.95, 1e-6, 0.1
  optimizer = optimizers.make_optimizer(options_for(name, b1=b1, b2=b2, eps=eps), lambda step: jnp.float32(rate))
  slots, updated = optimizer.init(params), params
  for _ in range(2):
    updates, slots = optimizer.update(gradients, slots, updated)
    updated = optax.apply_updates(updated, updates)

  def reference(p, g, decayed):
    p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
    m = v = 0.0
    for step in (1, 2):
      if name == "adamw":
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
      else:
        direction, m = np.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g
      p = p - rate * (direction + decay * decayed * p)
    return p

  expected = jax.tree.map(reference, params, gradients, optimizers.decayed(params))
  jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6), updated, expected)


def test_muon_orthogonalises_each_layer_of_a_stack(params, gradients):
  optimizer = optimizers.make_optimizer(
    options_for("muon", weight_decay=0.0, learning_rate=0.5, muon_learning_rate=1.0), lambda step: jnp.float32(0.5)
  )
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  for layer in [
    *np.asarray(updates["image"]["blocks"]["kernel"]),
    np.asarray(updates["image"]["projection"]["kernel"]),
  ]:
    values = np.linalg.svd(layer, compute_uv=False)
    # Newton-Schulz with Muon's coefficients leaves singular values between 0.7 and 1.2 of one another's scale.
    assert values.max() / values.min() < 2.0
    assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2, rel=0.3)
  # All else is Adam's at its own rate, with Nesterov's look-ahead: the first step is 1 + 0.9 / 1.9 everywhere.
  np.testing.assert_allclose(np.abs(updates["image"]["blocks"]["bias"]), 0.5 * (1 + 0.9 / 1.9), rtol=1e-3)


def test_adafactor_descends_and_decays(params, gradients):
  rate = 0.01
  for decay in (0.0, 0.5):
    optimizer = optimizers.make_optimizer(
      options_for("adafactor", weight_decay=decay, b1=0.0), lambda step: jnp.float32(rate)
    )
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    step = np.asarray(updates["image"]["projection"]["kernel"], np.float64)
    if decay:
      shrink = -rate * decay * np.asarray(params["image"]["projection"]["kernel"], np.float64)
      np.testing.assert_allclose(step - plain, shrink, rtol=1e-3, atol=1e-7)
    plain = step
    assert np.sum(plain * np.asarray(gradients["image"]["projection"]["kernel"])) < 0


def test_clipping_bounds_the_norm_over_all_parameters(params, gradients):
  optimizer = optimizers.make_optimizer(
    options_for("adamw", clip_norm=0.5, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0), lambda step: jnp.float32(1e6)
  )
  # With eps far above the gradient, Adam's update is the clipped gradient itself.
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(updates)))
  assert norm == pytest.approx(0.5, rel=1e-3)


def test_splitting_and_combining_lose_nothing(params):
  trained, frozen = optimizers.split_frozen(params, ("image/blocks/",))
  assert set(frozen["image"]) == {"blocks"} and set(trained["image"]) == {"projection"}
  combined = optimizers.combine(trained, frozen)
  assert jax.tree.structure(combined) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, combined, params)


@pytest.mark.parametrize(
  ("patterns", "named"), [(("vision/",), "matches no parameter"), ((".*",), "matches every parameter")]
)
def test_wrong_frozen_patterns_are_named(params, patterns, named):
  with pytest.raises(UserError, match=named):
    optimizers.split_frozen(params, patterns)
