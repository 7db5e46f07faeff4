"""Values and all gradients of both losses against float64 NumPy, on any number of devices, strategy and tile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec

PAIRS, DIM = 24, 6


def problem(rng, pairs=PAIRS, dim=DIM, groups=16):
  def unit():
    rows = rng.normal(size=(pairs, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

  return unit(), unit(), rng.integers(0, groups, pairs).astype(np.int32)


def reference(loss, image, text, scale, bias, group=None, label_smoothing=0.0):
  """Value and gradients (image, text, scale, bias), written out in float64."""
  image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
  pairs = len(image)
  own = np.eye(pairs, dtype=bool)
  counts = own | (np.ones_like(own) if group is None else group[:, None] != group)
  cosine = image @ text.T
  logits = scale * cosine + bias
  if loss == "sigmoid":
    sign = np.where(own, 1.0, -1.0)
    value = np.sum(np.where(counts, np.logaddexp(0, -sign * logits), 0)) / pairs
    slope = np.where(counts, -sign * np.exp(-np.logaddexp(0, sign * logits)), 0) / pairs
  else:
    value, slope = 0.0, np.zeros_like(logits)
    for axis in (1, 0):
      masked = np.where(counts, logits, -np.inf)
      highest = masked.max(axis=axis, keepdims=True)
      exps = np.exp(masked - highest)
      log_sum = np.log(exps.sum(axis=axis, keepdims=True)) + highest
      smooth = counts / counts.sum(axis=axis, keepdims=True)
      target = (1 - label_smoothing) * own + label_smoothing * smooth
      value += 0.5 * np.sum(target * (log_sum - logits)) / pairs
      slope += 0.5 * (np.exp(masked - log_sum) - target) / pairs
  return value, (scale * slope @ text, scale * slope.T @ image, np.sum(slope * cosine), np.sum(slope))


def computed(loss, image, text, scale, bias, group=None, *, devices=1, fsdp=1, **options):
  """The same on a mesh; with `devices=0` outside of any."""
  objective = functools.partial(losses.OBJECTIVES[loss], **options)
  group = None if group is None else jnp.asarray(group)

  def alone(image, text, scale, bias, group):
    return objective(image, text, logit_scale=scale, logit_bias=bias, group=group)[0]

  def shared(image, text, scale, bias, group):
    def local(image, text, scale, bias, group):
      return objective(image, text, logit_scale=scale, logit_bias=bias, group=group, axis_name=BATCH_AXES)[0]

    mesh = MeshSpec(fsdp=fsdp).make(jax.devices()[:devices])
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      local, mesh=mesh, in_specs=(split, split, everywhere, everywhere, split), out_specs=everywhere
    )
    return island(image, text, scale, bias, group)

  function = shared if devices else alone
  value, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3)))(
    jnp.asarray(image), jnp.asarray(text), jnp.float32(scale), jnp.float32(bias), group
  )
  return float(value), gradients


def assert_agrees(got, expected, scale, tolerance=1e-5):
  value, gradients = got
  reference_value, reference_gradients = expected
  assert value == pytest.approx(reference_value, rel=tolerance, abs=1e-6 * tolerance)
  for name, gradient, truth in zip(("image", "text", "scale", "bias"), gradients, reference_gradients, strict=True):
    # Where gradients cancel to nothing, rounding is measured against the terms that cancel: at most scale / pairs each.
    bound = tolerance * max(np.abs(truth).max(), scale / PAIRS if name in ("image", "text") else 0.1)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), truth, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
  ("devices", "fsdp", "strategy", "tile"),
  [
    (0, 1, "ring", None),
    (0, 1, "gather", 5),
    (1, 1, "ring", None),
    (2, 1, "gather", None),
    (4, 1, "ring", 4),
    (8, 1, "gather", 2),
    (8, 1, "ring", None),
    (8, 4, "ring", 2),
    (8, 2, "gather", None),
  ],
)
def test_value_and_gradients_equal_float64(loss, devices, fsdp, strategy, tile, rng):
  image, text, group = problem(rng)
  got = computed(loss, image, text, 7.0, -1.5, group, devices=devices, fsdp=fsdp, strategy=strategy, tile=tile)
  assert_agrees(got, reference(loss, image, text, 7.0, -1.5, group), scale=7.0)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_label_smoothing_spreads_over_what_counts(strategy, rng):
  image, text, group = problem(rng)
  got = computed("softmax", image, text, 5.0, 0.0, group, devices=4, strategy=strategy, label_smoothing=0.1)
  assert_agrees(got, reference("softmax", image, text, 5.0, 0.0, group, label_smoothing=0.1), scale=5.0)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_bfloat16_embeddings_give_float32_logits(loss, rng):
  image, text, group = problem(rng)
  image, text = jnp.asarray(image, jnp.bfloat16), jnp.asarray(text, jnp.bfloat16)
  value, gradients = computed(loss, image, text, 20.0, -5.0, group, devices=4)
  truth, reference_gradients = reference(loss, image, text, 20.0, -5.0, group)
  assert value == pytest.approx(truth, rel=1e-5)
  for gradient, expected in zip(gradients, reference_gradients, strict=True):
    # Gradients of bfloat16 inputs are bfloat16: 8 bits, and one more rounding where blocks are added.
    np.testing.assert_allclose(
      np.asarray(gradient, np.float64), expected, atol=max(2**-7 * np.abs(expected).max(), 1e-9)
    )


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["equal", "antipodal", "one huge logit", "one group"])
def test_extreme_inputs_stay_finite_and_exact(loss, kind, rng):
  image, text, group = problem(rng)
  group = np.arange(PAIRS, dtype=np.int32)
  if kind == "equal":
    image[:] = text[:] = image[0]
  elif kind == "antipodal":
    text = -image
  elif kind == "one huge logit":
    # Scores of 1e3 from a tower that is not normalised, in one row and column only.
    image[3] *= 30
    text[5] = image[3] / 30
  else:
    group[:] = 3
  got = computed(loss, image, text, 100.0, -10.0, group, devices=4)
  assert np.isfinite(got[0]) and all(np.isfinite(np.asarray(gradient)).all() for gradient in got[1])
  assert_agrees(got, reference(loss, image, text, 100.0, -10.0, group), scale=100.0)


FIXTURE = np.eye(2, dtype=np.float32), np.array([[1, 0], [0.6, 0.8]], np.float32)


@pytest.mark.parametrize(
  ("loss", "scale", "bias", "options", "expected"),
  [
    ("softmax", 1.0, 0.0, {}, 0.448879),
    ("softmax", 10.0, 0.0, {}, 0.036365),
    ("softmax", 1.0, 0.0, {"label_smoothing": 0.1}, 0.957758 / 2),
    ("sigmoid", 10.0, -10.0, {}, 1.419135),
  ],
)
def test_values_worked_out_by_hand(loss, scale, bias, options, expected):
  assert computed(loss, *FIXTURE, scale, bias, devices=0, **options)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pairs", "orthogonal", "paired"), [(8, 10.000363, 0.693465), (1024, 10.046488, 0.739590)])
def test_the_sigmoid_loss_at_initialisation(pairs, orthogonal, paired):
  zeros, unit = np.zeros((pairs, pairs), np.float32), np.eye(pairs, dtype=np.float32)
  assert computed("sigmoid", zeros, zeros, 10.0, -10.0, devices=0)[0] == pytest.approx(orthogonal, rel=1e-6)
  assert computed("sigmoid", unit, unit, 10.0, -10.0, devices=0)[0] == pytest.approx(paired, rel=1e-6)


def test_the_sigmoid_loss_of_a_large_batch_at_initialisation():
  zeros = jnp.zeros((32768, 1))
  assert losses.sigmoid_loss(zeros, zeros, logit_scale=10.0, logit_bias=-10.0)[0] == pytest.approx(11.487631, rel=1e-6)


def test_a_single_group_leaves_only_the_pairs(rng):
  image, text, _ = problem(rng)
  group = np.zeros(PAIRS, np.int32)
  assert computed("softmax", image, text, 30.0, 0.0, group, devices=8)[0] == pytest.approx(0.0, abs=1e-6)


def test_wrong_options_are_named(rng):
  image, text = (jnp.asarray(rows) for rows in problem(rng)[:2])
  with pytest.raises(UserError, match=r"loss_options.strategy='rings'"):
    losses.sigmoid_loss(image, text, logit_scale=1.0, logit_bias=None, strategy="rings")
  with pytest.raises(UserError, match=r"loss_options.tile=0"):
    losses.softmax_loss(image, text, logit_scale=1.0, tile=0)
  with pytest.raises(UserError, match=r"label_smoothing=1.5"):
    losses.softmax_loss(image, text, logit_scale=1.0, label_smoothing=1.5)
