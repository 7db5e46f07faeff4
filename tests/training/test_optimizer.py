"""Schedules against closed forms, optimisers against float64 updates, and the split into trained and frozen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.run import Run
from tests import tiny
from tests.training import optimizer_reference


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


# One parameter of every group that an optimiser may treat in its own way: stacks of layers, wide and narrow, more
# layers than features, matrices, tables, vectors and scalars.
SHAPES = {
  "image/blocks/mlp/kernel": (3, 8, 16),
  "image/blocks/tall/kernel": (2, 24, 6),
  "image/blocks/wide/kernel": (2, 128, 136),
  "image/blocks/mlp/bias": (3, 16),
  "image/blocks/norm/scale": (3, 8),
  "image/blocks/deep/kernel": (140, 3, 130),
  "image/blocks/deep/bias": (140, 130),
  "image/patches/kernel": (12, 8),
  "image/positions": (4, 8),
  "image/class_token": (8,),
  "text/tokens": (130, 136),
  "text/projection/kernel": (8, 4),
  "text/norm/bias": (8,),
  "log_logit_scale": (),
  "logit_bias": (),
}
DECAYED = {name for name, shape in SHAPES.items() if len(shape) - ("blocks" in name) >= 2}
MATRICES = {name for name in DECAYED if name.endswith("kernel")}


def tree(leaves):
  return traverse_util.unflatten_dict(leaves, sep="/")


def flat(nested):
  return traverse_util.flatten_dict(nested, sep="/")


def draw(rng, scale=1.0):
  return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


def updated_by(options, start, gradients, schedule):
  """The parameters after a step with each of the gradients, as the train step makes them."""
  optimizer = optimizers.make_optimizer(options, schedule)
  params = jax.tree.map(jnp.float32, tree(start))

  @jax.jit
  def step(number, gradient, opt_state, params):
    updates, opt_state = optimizer.update(gradient, optimizers.at_step(opt_state, number), params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = optimizer.init(params)
  for number, gradient in enumerate(gradients):
    params, opt_state = step(number, jax.tree.map(jnp.float32, tree(gradient)), opt_state, params)
  return flat(params)


def reference(options, start, gradients, schedule):
  """The same in float64, layer by layer."""
  rates = [float(schedule(number)) for number in range(len(gradients))]
  if options.clip_norm:
    norms = [math.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
    gradients = [
      {name: g * min(1, options.clip_norm / norm) for name, g in gradient.items()}
      for gradient, norm in zip(gradients, norms, strict=True)
    ]
  result = {}
  for name, param in start.items():
    rule = {"muon": optimizer_reference.muon if name in MATRICES else nadamw}.get(options.name) or getattr(
      optimizer_reference, options.name
    )
    decay = options.weight_decay if name in DECAYED else 0.0
    series = [gradient[name] for gradient in gradients]
    if "blocks" in name:
      layers = [rule(param[i], [g[i] for g in series], rates, options, decay) for i in range(len(param))]
      result[name] = np.stack(layers)
    else:
      result[name] = rule(param, series, rates, options, decay)
  return result


def nadamw(*arguments):
  return optimizer_reference.adamw(*arguments, nesterov=True)


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("adamw", {}),
    ("adamw", {"clip_norm": 1.0, "eps": 1e-2, "weight_decay": 2.0}),
    ("lion", {"b1": 0.95, "b2": 0.98}),
    ("lion", {"clip_norm": 0.5, "weight_decay": 1.0}),
    ("adafactor", {}),
    ("adafactor", {"b1": 0.0, "adafactor_decay": 0.5, "clip_norm": 1.0}),
    ("muon", {"learning_rate": 0.02}),
    ("muon", {"eps": 0.1, "muon_beta": 0.8, "muon_rms": 1.0, "weight_decay": 2.0, "clip_norm": 1.0}),
  ],
)
def test_every_group_of_parameters_matches_float64(name, changes, rng):
  options = options_for(name, **{"learning_rate": 0.01, "weight_decay": 0.3, "eps": 1e-6, **changes})
  schedule = optimizers.make_schedule("linear", peak=options.learning_rate, total_steps=6, warmup_steps=2)
  start = draw(rng)
  # Layers of one stack differ in the size of their gradients a thousandfold: statistics over the stack would show.
  sizes = {
    name: 10.0 ** rng.uniform(-3, 0, size=(*shape[:1], *[1] * (len(shape) - 1))) for name, shape in SHAPES.items()
  }
  gradients = [{name: g * sizes[name] for name, g in draw(rng).items()} for _ in range(3)]
  got, want = updated_by(options, start, gradients, schedule), reference(options, start, gradients, schedule)
  for name, leaf in want.items():
    # Of the step that was taken, beside the float32 of the parameter itself.
    taken = np.abs(leaf - start[name]).max()
    np.testing.assert_allclose(got[name], leaf, rtol=2e-6, atol=2e-4 * taken, err_msg=name)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_nothing_but_decay_moves_without_gradients(name):
  """On the leaves of a real model of CLIP's kind."""
  _, shapes = dual_encoder.abstract(Run.from_config(small_clip()).model)
  start = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes)
  rate, steps, options = 0.1, 5, options_for(name, learning_rate=0.1, muon_learning_rate=0.2, weight_decay=0.3)
  optimizer = optimizers.make_optimizer(options, lambda step: jnp.float32(rate))
  gradients = jax.tree.map(jnp.zeros_like, start)

  @jax.jit
  def update(params, opt_state):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = start, optimizer.init(start)
  for _ in range(steps):
    params, opt_state = update(params, opt_state)
  decayed = flat(optimizers.decayed(start))
  assert {"log_logit_scale", "image/class_token"} < {name for name, decays in decayed.items() if not decays}
  for leaf, (old, new) in ((key, (old, flat(params)[key])) for key, old in flat(start).items()):
    if not decayed[leaf]:
      np.testing.assert_array_equal(new, old, err_msg=leaf)
      continue
    own = 0.2 if name == "muon" and leaf.endswith("kernel") else rate
    np.testing.assert_allclose(new, old * (1 - own * 0.3) ** steps, rtol=1e-5, err_msg=leaf)


def small_clip():
  config = tiny.get_config()
  config.model.image.update({"class_token": True, "pool": "cls", "pre_norm": True})
  return config


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_layers_of_a_stack_are_updated_as_they_are_apart(name, rng):
  options = options_for(name, learning_rate=0.01)
  shapes = {"kernel": (130, 140), "bias": (140,)}
  size = [1.0, 1e-3, 30.0]
  start = {key: rng.normal(size=(3, *shape)) for key, shape in shapes.items()}
  gradients = {key: np.stack([s * rng.normal(size=shape) for s in size]) for key, shape in shapes.items()}

  def step(params, gradient):
    params, gradient = (jax.tree.map(jnp.float32, part) for part in (params, gradient))
    optimizer = optimizers.make_optimizer(options, lambda _: jnp.float32(0.01))
    return optimizer.update(gradient, optimizer.init(params), params)[0]

  together = step({"blocks": start}, {"blocks": gradients})["blocks"]
  for layer in range(3):
    apart = step(*({key: part[layer] for key, part in side.items()} for side in (start, gradients)))
    for key in shapes:
      np.testing.assert_allclose(together[key][layer], apart[key], rtol=1e-5, atol=1e-9)


def test_muon_is_optax_own_where_nothing_decays(params, gradients):
  options = options_for("muon", weight_decay=0.0, learning_rate=0.5, muon_learning_rate=1.0, eps=1e-3)
  ours = optimizers.make_optimizer(options, lambda step: jnp.float32(0.5))

  def dimensions(params):
    numbers = optax.contrib.MuonDimensionNumbers
    return {
      "image": {"blocks": {"kernel": numbers(1, 2), "bias": None}, "projection": {"kernel": numbers(0, 1)}},
      "log_logit_scale": None,
    }

  theirs = optax.contrib.muon(
    1.0,
    beta=0.95,
    eps=1e-3,
    adam_b1=0.9,
    adam_b2=0.95,
    adam_learning_rate=0.5,
    muon_weight_dimension_numbers=dimensions,
    consistent_rms=0.2,
  )
  updates = [optimizer.update(gradients, optimizer.init(params), params)[0] for optimizer in (ours, theirs)]
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), *updates)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_the_rate_follows_the_step_of_the_run(name, params, gradients):
  """However many updates were skipped before it."""
  options = options_for(name, weight_decay=0.0)
  optimizer = optimizers.make_optimizer(options, lambda step: 1e-3 / (1 + step))
  fresh = optimizer.init(params)
  late, _ = optimizer.update(gradients, optimizers.at_step(fresh, 7), params)
  first, opt_state = optimizer.update(gradients, optimizers.at_step(fresh, 0), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(8 * a, b, rtol=1e-6, atol=1e-12), late, first)
  # Nothing but the schedules' count was moved: the moments count what went into them.
  kept = [leaf for leaf in jax.tree.leaves(optimizers.at_step(opt_state, 7)) if leaf.dtype == jnp.int32]
  assert set(map(int, kept)) <= {1, 7} and 7 in map(int, kept)


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
  ("patterns", "named"),
  [
    (("visual/",), "matches no parameter"),
    ((".*",), "matches every parameter"),
    (("image/", "("), "which is no regular expression: missing"),
    (("[a",), "which is no regular expression: unterminated"),
    (("*",), "which is no regular expression: nothing to repeat"),
  ],
)
def test_wrong_frozen_patterns_are_named(params, patterns, named):
  with pytest.raises(UserError, match=named):
    optimizers.split_frozen(params, patterns)
