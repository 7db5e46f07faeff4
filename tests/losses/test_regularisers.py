"""Losses that spread, correlate, cluster or remember: dense formulas in float64 on any mesh, and their limits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.losses import prototypes
from contrastive_jax.losses.prototypes import Earlier
from contrastive_jax.losses.queue import Queue
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of

PAIRS, DIM, QUEUE, PROTOTYPES = 16, 5, 24, 7
OPTIONS = {"temperature": 0.2, "code_temperature": 0.1}


def unit(rows):
  return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def problem(rng):
  """What is differentiated, and constants. Pairs share groups and captions with each other and with the queue."""
  normal = rng.standard_normal
  learned = {
    "image": normal((PAIRS, DIM)),
    "text": normal((PAIRS, DIM)),
    "scale": np.float32(5.0),
    "prototypes": normal((PROTOTYPES, DIM)),
  }
  every = keys_of(rng.integers(0, 30, PAIRS + QUEUE), rng.integers(0, 60, PAIRS + QUEUE))
  given = {
    "keys": every[:PAIRS],
    "queue_image": np.asarray(unit(normal((QUEUE, DIM))), np.float32),
    "queue_text": np.asarray(unit(normal((QUEUE, DIM))), np.float32),
    "queue_keys": every[PAIRS:],
    "valid": np.arange(QUEUE) < 17,
    "slow_image": np.asarray(unit(normal((PAIRS, DIM))), np.float32),
    "slow_text": np.asarray(unit(normal((PAIRS, DIM))), np.float32),
  }
  return {name: np.asarray(value, np.float32) for name, value in learned.items()}, given


def queue_of(x):
  return Queue(x.queue_image, x.queue_text, x.queue_keys, x.valid)


def earlier_of(x):
  return Earlier(x.queue_image, x.queue_text, x.valid)


# Each loss as the library computes it of a device's share, given where and how.
OURS = {
  "uniformity": lambda x, axis_name=None, **how: losses.uniformity(
    x.image, group=x.keys, t=1.5, axis_name=axis_name, **how
  ),
  "cross_uniformity": lambda x, axis_name=None, **how: losses.cross_uniformity(
    x.image, x.text, group=x.keys, axis_name=axis_name, **how
  ),
  "correlation": lambda x, axis_name=None, **how: losses.cross_correlation_loss(
    x.image, x.text, off_diagonal=0.3, axis_name=axis_name
  ),
  "prototypes": lambda x, axis_name=None, **how: losses.swapped_prototypes_loss(
    x.image, x.text, x.prototypes, axis_name=axis_name, **OPTIONS
  ),
  "earlier": lambda x, axis_name=None, **how: losses.swapped_prototypes_loss(
    x.image, x.text, x.prototypes, earlier=earlier_of(x), axis_name=axis_name, **OPTIONS
  ),
  "queue": lambda x, axis_name=None, **how: losses.queued_softmax_loss(
    x.image, x.text, queue_of(x), logit_scale=x.scale, group=x.keys, axis_name=axis_name, **how
  ),
  "soft": lambda x, axis_name=None, **how: losses.queued_softmax_loss(
    x.image,
    x.text,
    queue_of(x),
    logit_scale=x.scale,
    group=x.keys,
    average=(x.slow_image, x.slow_text),
    soft_share=0.4,
    axis_name=axis_name,
    **how,
  ),
}


def share_a_key(one, other):
  return np.asarray((one[:, None] == other[None]).all(-1).any(-1))


def plain(x):
  """The same in one piece, as the papers write it."""
  apart = ~share_a_key(x.keys, x.keys)

  def log_mean_kernel(one, other, t):
    distance = jnp.sum((one[:, None] - other[None]) ** 2, axis=2)
    return jnp.log(jnp.sum(jnp.where(apart, jnp.exp(-t * distance), 0)) / apart.sum())

  standardized = [(side - side.mean(0)) / jnp.sqrt(side.var(0) + 1e-6) for side in (x.image, x.text)]
  correlations = standardized[0].T @ standardized[1] / PAIRS
  target = jnp.eye(DIM)
  weighted = jnp.where(target == 1, 1, 0.3) * (correlations - target) ** 2

  def codes(scores):
    """Sinkhorn's rounds as SwAV's code has them."""
    q = jnp.exp(scores / OPTIONS["code_temperature"])
    q = q / q.sum()
    for _ in range(3):
      q = q / q.sum(axis=0, keepdims=True) / PROTOTYPES
      q = q / q.sum(axis=1, keepdims=True) / len(q)
    return jax.lax.stop_gradient(q[:PAIRS] * len(q))

  def swapped(*before):
    scores = [jnp.concatenate([side, *more]) @ unit(x.prototypes).T for side, *more in zip(*before, strict=True)]
    logs = [jax.nn.log_softmax(side[:PAIRS] / OPTIONS["temperature"], axis=1) for side in scores]
    return -jnp.mean(jnp.sum(codes(scores[1]) * logs[0] + codes(scores[0]) * logs[1], axis=1)) / 2

  def cross_entropy(rows, columns, queue, slow_rows=None):
    every = jnp.concatenate([columns, queue]).T
    counts = np.concatenate([apart | np.eye(PAIRS, dtype=bool), x.valid & ~share_a_key(x.keys, x.queue_keys)], axis=1)
    targets = jnp.eye(*counts.shape)
    if slow_rows is not None:
      logits = jnp.where(counts, jax.lax.stop_gradient(x.scale) * slow_rows @ every, -jnp.inf)
      targets = 0.6 * targets + 0.4 * jax.nn.softmax(logits, axis=1)
    logits = jnp.where(counts, x.scale * rows @ every, -1e9)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1))

  directions = (x.image, x.text, x.queue_text), (x.text, x.image, x.queue_image)
  slow = (x.image, x.slow_text, x.queue_text, x.slow_image), (x.text, x.slow_image, x.queue_image, x.slow_text)
  filled = [side[x.valid] for side in (x.queue_image, x.queue_text)]
  return {
    "uniformity": log_mean_kernel(x.image, x.image, 1.5),
    "cross_uniformity": log_mean_kernel(x.image, x.text, 2.0),
    "correlation": jnp.sum(weighted),
    "prototypes": swapped((x.image, x.text)),
    "earlier": swapped((x.image, x.text), filled),
    "queue": sum(cross_entropy(*sides) for sides in directions) / 2,
    "soft": sum(cross_entropy(*sides) for sides in slow) / 2,
  }


def differentiated(functions, learned):
  """Value and gradients of each loss by all that is differentiated, embeddings before they are normalised."""

  def of(function):
    def normalised(learned):
      return function({**learned, "image": unit(learned["image"]), "text": unit(learned["text"])})

    return jax.value_and_grad(normalised)(learned)

  return {name: of(function) for name, function in functions.items()}


def computed(learned, given, devices=0, **how):
  given = jax.tree.map(jnp.asarray, given)

  def of(loss):
    def local(x, given, **where):
      return loss(types.SimpleNamespace(**x, **given), **where, **how)[0]

    if not devices:
      return lambda x: local(x, given)
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      lambda x, given: local(x, given, axis_name=BATCH_AXES),
      mesh=MeshSpec(fsdp=min(2, devices)).make(jax.devices()[:devices]),
      in_specs=({"image": split, "text": split, "scale": everywhere, "prototypes": everywhere}, split),
      out_specs=everywhere,
    )
    return lambda x: island(x, given)

  functions = {name: of(loss) for name, loss in OURS.items()}
  return jax.jit(lambda learned: differentiated(functions, learned))(learned)


def check(learned, given, **layout):
  with jax.enable_x64(True):
    wide = {name: jnp.asarray(value, jnp.float64) for name, value in learned.items()}
    given_wide = {**given, **{name: np.float64(given[name]) for name in given if name.endswith(("_image", "_text"))}}
    functions = {name: lambda x, name=name: plain(types.SimpleNamespace(**x, **given_wide))[name] for name in OURS}
    expected = jax.tree.map(np.asarray, differentiated(functions, wide))
  for name, (value, gradients) in computed(learned, given, **layout).items():
    truth, exact = expected[name]
    assert float(value) == pytest.approx(float(truth), rel=2e-5), name
    for what, gradient in gradients.items():
      bound = 5e-5 * max(np.abs(exact[what]).max(), 1e-4)
      np.testing.assert_allclose(gradient, exact[what], rtol=0, atol=bound, err_msg=f"{name} by {what}")
  # Every loss reaches what it should, so that a gradient that is 0 everywhere is no agreement.
  assert all(np.any(expected[name][1]["image"]) for name in expected) and np.any(expected["queue"][1]["scale"])
  assert np.any(expected["earlier"][1]["prototypes"]) and expected["earlier"][0] != expected["prototypes"][0]


@pytest.mark.slow
def test_value_and_gradients_equal_the_dense_formula_in_float64(rng):
  check(*problem(rng), devices=8, strategy="ring")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("devices", "strategy", "tile"),
  [(0, "ring", None), (1, "gather", 5), (2, "gather", 1), (2, "ring", 5), (4, "ring", 1), (8, "gather", None)],
)
def test_value_and_gradients_on_every_mesh(devices, strategy, tile, rng):
  check(*problem(rng), devices=devices, strategy=strategy, tile=tile)


@pytest.mark.slow
def test_rows_of_prototypes_in_blocks_of_which_the_last_is_not_full(rng, monkeypatch):
  monkeypatch.setattr(prototypes, "_ROWS", 7)
  check(*problem(rng), devices=1)


IMAGE, TEXT = jnp.eye(2), jnp.asarray([[1, 0], [0.6, 0.8]])


def test_the_gap_terms_of_the_fixture():
  within = [float(losses.uniformity(side)[0]) for side in (IMAGE, TEXT)]
  assert within == pytest.approx([-4, -1.6], abs=1e-6) and np.mean(within) == pytest.approx(-2.8, abs=1e-6)
  assert losses.cross_uniformity(IMAGE, TEXT)[0] == pytest.approx(-2.206311, abs=1e-6)
  assert jnp.mean(losses.squared_distances(IMAGE, TEXT)) == pytest.approx(0.2, abs=1e-6)
  # SepCLR's temperature of 0.5 is a t of 1.
  assert losses.uniformity(IMAGE, t=1.0)[0] == pytest.approx(-2, abs=1e-6)


def test_uniformity_of_equal_towers_and_of_equal_points(rng):
  image = jnp.float32(unit(rng.standard_normal((9, 4))))
  assert losses.cross_uniformity(image, image, tile=4)[0] == pytest.approx(float(losses.uniformity(image)[0]), rel=1e-6)
  collapsed = jnp.tile(image[:1], (9, 1))
  assert losses.uniformity(collapsed)[0] == pytest.approx(0, abs=1e-6)
  # Where all pairs belong together nothing is pushed apart, and the mean of nothing counts 0.
  value, gradient = jax.value_and_grad(lambda rows: losses.uniformity(rows, group=jnp.zeros(9, jnp.int32))[0])(image)
  assert value == 0 and not np.any(gradient)


def test_the_widest_points_at_the_sharpest_kernel_are_still_told_apart():
  """Opposite points at the largest t: e^-80 is a float32 number, and its gradient is that of the distance."""
  image = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
  assert losses.uniformity(image, t=20.0)[0] == pytest.approx(-80, rel=1e-6)
  with pytest.raises(UserError, match=r"^t=21\.0 must be above 0 and at most 20"):
    losses.uniformity(image, t=21.0)


def test_a_correlation_that_is_the_identity_costs_nothing_and_copies_of_the_batch_change_nothing(rng):
  signs = jnp.float32(np.array([[(-1) ** bin(row & column).count("1") for column in (1, 2, 4)] for row in range(8)]))
  assert losses.cross_correlation_loss(signs, 3 * signs + 1)[0] == pytest.approx(0, abs=1e-5)
  image, text = jnp.float32(rng.standard_normal((2, 8, 3)))
  once, twice = (
    losses.cross_correlation_loss(*(jnp.tile(side, (copies, 1)) for side in (image, text)))[0] for copies in (1, 2)
  )
  assert twice == pytest.approx(float(once), rel=1e-5)


def codes_of(logits, **how):
  scales = losses.balancing_scales(lambda rows: rows, logits, jnp.ones(len(logits), bool), **how)
  return np.asarray(jax.nn.softmax(logits + scales, axis=1))


def test_prototypes_that_are_all_equally_near_leave_the_logarithm_of_their_number(rng):
  image, text = (jnp.float32(unit(rng.standard_normal((6, 4)))) for _ in range(2))
  same = jnp.ones((3000, 4))
  loss, metrics = losses.swapped_prototypes_loss(image, text, same)
  assert loss == pytest.approx(8.0064, abs=1e-4) and metrics["prototypes_used"] == pytest.approx(3000, rel=1e-4)
  np.testing.assert_allclose(codes_of(image @ same[:5].T / 0.05), 1 / 5, rtol=1e-5)


def test_codes_sum_to_one_and_use_all_prototypes_equally_even_where_exponentials_overflow(rng):
  logits = jnp.float32(40 * rng.standard_normal((32, 4)) + 200)
  codes = codes_of(logits, iterations=200)
  np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(codes.sum(axis=0), 8, rtol=0.02)
  # Of two samples at two prototypes each takes one: e^(1 / 0.05) to 1.
  np.testing.assert_allclose(codes_of(jnp.eye(2) / 0.05), np.eye(2), atol=1e-8)
  loss, _ = losses.swapped_prototypes_loss(jnp.eye(2), jnp.eye(2), jnp.eye(2))
  assert loss == pytest.approx(4.54e-5, rel=1e-3)


def test_an_empty_queue_leaves_the_softmax_loss(rng):
  learned, given = jax.tree.map(jnp.asarray, problem(rng))
  image, text = unit(learned["image"]), unit(learned["text"])
  queue = Queue(given["queue_image"], given["queue_text"], given["queue_keys"], jnp.zeros(QUEUE, bool))

  how = {"logit_scale": 9.0, "group": given["keys"]}
  mine, truth = losses.queued_softmax_loss(image, text, queue, **how)[0], losses.softmax_loss(image, text, **how)[0]
  assert mine == pytest.approx(float(truth), rel=1e-6)


def test_targets_of_an_average_that_is_sure_of_another_pair():
  """Each tower is sure of its pair, by a logit of 100; half of the targets lie on the other pair, which has 0."""
  both, keys = jnp.eye(2), jnp.arange(4, dtype=jnp.uint32).reshape(2, 1, 2)

  @jax.jit
  def run(text, slow_text, scale, share):
    how = {"logit_scale": scale, "group": keys, "average": (both, slow_text), "soft_share": share}
    return losses.queued_softmax_loss(slow_text, text, None, **how)[0]

  differentiated = jax.value_and_grad(run)
  for slow_text, scale, share, expected in (
    (both, 100.0, 0.5, 0.0),
    (both[::-1], 100.0, 0.5, 50.0),
    # Without a queue, and with an average that is the towers themselves and gives no targets, it is the softmax loss.
    (both, 1.0, 0.0, np.log1p(np.exp(-1))),
  ):
    value, gradient = differentiated(both, slow_text, scale, share)
    assert np.isfinite(gradient).all() and value == pytest.approx(expected, abs=1e-4)
