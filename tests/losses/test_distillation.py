"""Losses that distil against float64 NumPy on any number of devices, and where they must vanish."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of

PAIRS, DIM, TEACHER_DIM = 24, 6, 9


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def problem(rng, cone=0.0):
  """Student and teacher embeddings in float64; around an axis they are as similar as at the start of training."""
  sides = [rng.normal(size=(PAIRS, dim)) for dim in (DIM, DIM, TEACHER_DIM, TEACHER_DIM)]
  return [unit(unit(rows) + cone * unit(rng.normal(size=(1, rows.shape[1])))) for rows in sides]


def log_softmax(logits, axis):
  shifted = logits - logits.max(axis=axis, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def divergence(image, text, teacher_image, teacher_text, scale, teacher_scale):
  """The mean of both directions, and its gradients by image, text and scale, written out."""
  cosine = image @ text.T
  value, slope = 0.0, np.zeros_like(cosine)
  for axis in (0, 1):
    student = log_softmax(scale * cosine, axis)
    teacher = log_softmax(teacher_scale * (teacher_image @ teacher_text.T), axis)
    value += np.sum(np.exp(teacher) * (teacher - student)) / (2 * len(image))
    slope += (np.exp(student) - np.exp(teacher)) / (2 * len(image))
  return value, (scale * slope @ text, scale * slope.T @ image, np.sum(slope * cosine))


def relations(image, teacher_image):
  apart = ~np.eye(len(image), dtype=bool)
  error = np.where(apart, image @ image.T - teacher_image @ teacher_image.T, 0)
  return np.sum(error**2) / apart.sum(), 4 * error @ image / apart.sum()


def computed(loss, sides, scale, devices=0, fsdp=1, dtype="float32", **options):
  """Value and gradients by image, text and scale, as the library has them."""
  image, text, *teacher = (jnp.asarray(side, dtype) for side in sides)
  function = functools.partial(loss, **options)
  if devices:
    mesh = MeshSpec(fsdp=fsdp).make(jax.devices()[:devices])
    pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    local = function

    def function(*sides, logit_scale):
      return jax.shard_map(
        lambda scale, *shards: local(*shards, logit_scale=scale, axis_name=BATCH_AXES),
        mesh=mesh,
        in_specs=(everywhere, *[pairs] * 4),
        out_specs=everywhere,
      )(logit_scale, *sides)

  def value(image, text, scale):
    return function(image, text, *teacher, logit_scale=scale)[0]

  return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(image, text, jnp.asarray(scale, dtype))


LAYOUTS = [
  {},
  {"tile": 7},
  {"devices": 2, "strategy": "gather"},
  {"devices": 4, "fsdp": 2, "strategy": "ring", "tile": 4},
  {"devices": 8, "fsdp": 4, "strategy": "ring"},
  {"devices": 8, "strategy": "gather", "tile": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("cone", "scale"), [(0.0, 10.0), (3.0, 100.0)])
def test_the_divergence_equals_float64(layout, cone, scale, rng):
  sides = problem(rng, cone)
  value, gradients = divergence(*sides, scale, 1 / 0.07)
  got, found = computed(losses.similarity_distillation, sides, scale, teacher_temperature=0.07, **layout)
  assert got == pytest.approx(value, rel=2e-5)
  for one, other in zip(found, gradients, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cone", [0.0, 3.0])
def test_the_relational_loss_equals_float64(layout, cone, rng):
  sides = problem(rng, cone)
  value, gradient = relations(sides[0], sides[2])
  got, (d_image, d_text, d_scale) = computed(losses.relational_distillation, sides, 1.0, **layout)
  assert got == pytest.approx(value, rel=2e-5)
  np.testing.assert_allclose(d_image, gradient, rtol=0, atol=3e-5 * np.abs(gradient).max())
  assert not np.any(d_text) and d_scale == 0


def test_a_temperature_of_its_own_leaves_the_logit_scale_alone(rng):
  sides = problem(rng)
  value, gradients = divergence(*sides, 1 / 0.2, 1 / 0.05)
  got, found = computed(losses.similarity_distillation, sides, 33.0, temperature=0.2)
  assert got == pytest.approx(value, rel=1e-5) and found[2] == 0
  np.testing.assert_allclose(found[0], gradients[0], rtol=0, atol=1e-5 * np.abs(gradients[0]).max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(layout, rng):
  image, text, _, _ = problem(rng)
  for loss, options in (
    (losses.similarity_distillation, {"teacher_temperature": 1 / 16}),
    (losses.relational_distillation, {}),
  ):
    value, gradients = computed(loss, (image, text, image, text), 16.0, **layout, **options)
    assert value == pytest.approx(0, abs=1e-6)
    assert max(np.abs(leaf).max() for leaf in gradients) < 1e-6
  for distance in losses.DISTANCES:
    x = jnp.asarray(image, jnp.float32)
    distances, pull = jax.vjp(lambda x, d=distance: losses.feature_distances(x, jax.lax.stop_gradient(x), d), x)
    np.testing.assert_allclose(distances, 0, atol=1e-12)
    np.testing.assert_allclose(pull(jnp.ones_like(distances))[0], 0, atol=1e-6)


def test_the_divergence_is_never_negative(rng):
  for scale in (1.0, 20.0, 100.0):
    sides = problem(rng)
    close = [unit(side + 1e-3 * rng.normal(size=side.shape)) for side in (sides[2], sides[3])]
    value, _ = computed(losses.similarity_distillation, (*close, *sides[2:]), scale, teacher_temperature=1 / scale)
    assert value > -1e-6


def test_distances_have_closed_forms():
  """Vectors of length 3 at 0, 60, 90 and 180 degrees from their teacher."""
  angles = np.deg2rad([0, 60, 90, 180])
  student = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  teacher = np.tile([1.0, 0.0], (4, 1))
  student, teacher = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
  np.testing.assert_allclose(losses.feature_distances(student, teacher), [0, 0.5, 1, 2], atol=1e-6)
  np.testing.assert_allclose(losses.feature_distances(student, teacher, "mse"), [4, 7, 10, 16], rtol=1e-6)


def test_a_zero_embedding_has_a_finite_gradient():
  gradient = jax.grad(lambda x: jnp.sum(losses.feature_distances(x, jnp.ones((1, 4)) / 2)))(jnp.zeros((1, 4)))
  assert np.all(np.isfinite(gradient))


@pytest.fixture(scope="module")
def drawn_to_the_teacher():
  """Value and gradients of the loss whose positives are the teacher's, on four devices around a ring."""

  def local(scale, weights, keys, *sides):
    how = {"logit_scale": scale, "pair_weights": weights, "group": keys, "axis_name": BATCH_AXES}
    return losses.positive_distillation(*sides, **how, strategy="ring", tile=4)[0]

  pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
  mesh = MeshSpec(fsdp=2).make(jax.devices()[:4])
  island = jax.shard_map(local, mesh=mesh, in_specs=(everywhere, *[pairs] * 6), out_specs=everywhere)
  run = jax.jit(jax.value_and_grad(island, argnums=(0, 3, 4, 5, 6)))

  def computed(sides, scale, weights, group):
    sides, weights = ([jnp.asarray(each, jnp.float32) for each in some] for some in (sides, [weights]))
    return run(jnp.float32(scale), *weights, keys_of(group), *sides)

  return computed


def drawn(sides, scale, weights, group):
  """Each row's softmax over the teacher's positive and the student's negatives, in float64."""
  image, text, old_image, old_text = sides
  total = 0.0
  for rows, columns, old in ((image, text, old_text), (text, image, old_image)):
    logits = jnp.where(group[:, None] == group, -jnp.inf, scale * rows @ columns.T)
    positive = scale * jnp.sum(rows * jax.lax.stop_gradient(old), axis=1)
    lines = jax.nn.logsumexp(jnp.concatenate([positive[:, None], logits], axis=1), axis=1) - positive
    total += jnp.sum(weights * lines) / jnp.sum(weights) / 2
  return total


def test_replayed_pairs_are_drawn_to_the_teacher_among_all_negatives(drawn_to_the_teacher, rng):
  sides = [unit(rng.normal(size=(PAIRS, DIM))) for _ in range(4)]
  group, weights = rng.integers(0, 18, PAIRS), np.float64(np.arange(PAIRS) % 3 == 0)
  found, (d_scale, *gradients) = drawn_to_the_teacher(sides, 10.0, weights, group)
  with jax.enable_x64(True):
    truth, exact = jax.value_and_grad(drawn, argnums=(0, 1))(
      [jnp.asarray(side) for side in sides], 10.0, weights, group
    )
    exact = jax.tree.map(np.asarray, exact)
  assert float(found) == pytest.approx(float(truth), rel=1e-5)
  assert float(d_scale) == pytest.approx(float(exact[1]), rel=1e-4)
  for one, other in zip(gradients[:2], exact[0][:2], strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())
  assert not np.any(gradients[2]) and not np.any(gradients[3])


def test_a_teacher_that_is_the_student_leaves_the_softmax_and_no_replay_leaves_nothing(drawn_to_the_teacher, rng):
  image, text = (unit(rng.normal(size=(PAIRS, DIM))) for _ in range(2))
  same, alone, everyone = (image, text, image, text), np.arange(PAIRS), np.ones(PAIRS)
  logits = 10 * image @ text.T
  expected = -np.mean([np.diag(log_softmax(logits, axis)) for axis in (0, 1)])
  assert float(drawn_to_the_teacher(same, 10.0, everyone, alone)[0]) == pytest.approx(expected, rel=1e-5)
  value, gradients = drawn_to_the_teacher(same, 10.0, 0 * everyone, alone)
  assert value == 0 and not any(np.any(leaf) for leaf in gradients)


@pytest.mark.parametrize("loss", losses.DISTILLATIONS.values())
def test_memory_is_that_of_tiles(loss):
  """Twice the pairs take twice the memory once the matrix is cut into tiles, not four times."""

  def temporaries(pairs):
    sides = [jax.ShapeDtypeStruct((pairs, 8), jnp.float32)] * 4
    gradient = jax.grad(lambda image, text, *teacher: loss(image, text, *teacher, logit_scale=10.0)[0])
    return jax.jit(gradient).lower(*sides).compile().memory_analysis().temp_size_in_bytes

  small, large = temporaries(16384), temporaries(65536)
  assert 100 * large < 4 * 65536**2
  assert large < 5 * small


def test_wrong_options_are_named(rng):
  sides = [jnp.asarray(side, jnp.float32) for side in problem(rng)]
  with pytest.raises(UserError, match=r"^teacher_temperature=0.0"):
    losses.similarity_distillation(*sides, logit_scale=1.0, teacher_temperature=0.0)
  with pytest.raises(UserError, match=r"^strategy='rings'"):
    losses.relational_distillation(*sides, strategy="rings")
  with pytest.raises(UserError, match=r"distance='cosin' is unknown \(did you mean 'cosine'\?\)"):
    losses.feature_distances(sides[0], sides[0], "cosin")


def test_the_default_tiles_are_used_for_large_batches():
  assert pairwise.tile_shape(16384, 16384, None) == (1024, 1024)
