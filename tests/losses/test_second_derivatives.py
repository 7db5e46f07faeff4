"""Derivatives of gradients against NumPy in extended precision, and gradients where a line of logits is empty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec

PAIRS, DIM, TEACHER_DIM = 12, 4, 5
GROUP = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9], np.int32)
TEACHER_SCALE = 20.0


def unit(rng, *shape):
  rows = rng.normal(size=shape)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def log_softmax(logits, axis):
  shifted = logits - logits.max(axis=axis, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def counted(group):
  return np.eye(PAIRS, dtype=bool) | (True if group is None else group[:, None] != group)


def softmax(image, text, scale, bias, *, group=None, smoothing=0.0, coefficient=1.0, extra=None):
  del bias
  value, own, counts = 0.0, np.eye(PAIRS, dtype=bool), counted(group)
  for cosine in (image @ text.T, text @ image.T):
    logits = np.where(counts, scale * cosine, -np.inf)
    terms = np.where(own, coefficient, 1.0) * np.exp(logits)
    total = terms.sum(1) + (0 if extra is None else np.exp(scale * extra).sum(1))
    target = (1 - smoothing) * own + smoothing * counts / counts.sum(1, keepdims=True)
    value += np.sum(np.log(total)) - np.sum(target * np.where(counts, logits, 0))
  return value / (2 * PAIRS)


def sigmoid(image, text, scale, bias, *, group=None):
  sign = np.where(np.eye(PAIRS, dtype=bool), 1, -1)
  return np.sum(np.where(counted(group), np.logaddexp(0, -sign * (scale * (image @ text.T) + bias)), 0)) / PAIRS


def similarity(image, text, scale, bias, *, teacher):
  del bias
  value = 0.0
  for axis in (0, 1):
    student = log_softmax(scale * (image @ text.T), axis)
    taught = log_softmax(TEACHER_SCALE * (teacher[0] @ teacher[1].T), axis)
    value += np.sum(np.exp(taught) * (taught - student)) / (2 * PAIRS)
  return value


def relational(image, text, scale, bias, *, teacher):
  del text, scale, bias
  error = np.where(np.eye(PAIRS, dtype=bool), 0, image @ image.T - teacher[0] @ teacher[0].T)
  return np.sum(error**2) / (PAIRS * (PAIRS - 1))


TEACHER = unit(np.random.default_rng(7), 2, PAIRS, TEACHER_DIM)
EXTRA = np.random.default_rng(8).uniform(-1, 1, (PAIRS, 3))
EXTRA[:, 0], EXTRA[3] = -np.inf, -np.inf

# Name -> reference, its options, the library's loss, its options, arrays of the pairs that it takes by name.
CASES = {
  "softmax": (softmax, {}, losses.softmax_loss, {}, {}),
  "softmax, groups and smoothing": (
    softmax, {"group": GROUP, "smoothing": 0.1}, losses.softmax_loss, {"label_smoothing": 0.1}, {"group": GROUP},
  ),
  "softmax, extra negatives": (
    softmax, {"extra": EXTRA}, losses.weighted_softmax_loss, {}, {"image_extra": EXTRA, "text_extra": EXTRA},
  ),
  "decoupled": (
    softmax, {"coefficient": 0.0}, losses.weighted_softmax_loss, {"positive_coefficient": 0.0}, {},
  ),
  "sigmoid": (sigmoid, {}, losses.sigmoid_loss, {}, {}),
  "sigmoid, groups": (sigmoid, {"group": GROUP}, losses.sigmoid_loss, {}, {"group": GROUP}),
  "similarity distillation": (
    similarity, {"teacher": TEACHER}, losses.similarity_distillation, {"teacher_temperature": 1 / TEACHER_SCALE},
    {"teacher_image": TEACHER[0], "teacher_text": TEACHER[1]},
  ),
  "relational distillation": (
    relational, {"teacher": TEACHER}, losses.relational_distillation, {}, {"teacher_image": TEACHER[0]},
  ),
}  # fmt: skip
LAYOUTS = {
  "single": (0, {}),
  "single, tiles": (0, {"tile": 5}),
  "gather": (2, {"strategy": "gather", "tile": 4}),
  "ring": (4, {"strategy": "ring"}),
}
FAST = {("sigmoid", "ring"), ("softmax, groups and smoothing", "single, tiles")}


def marks(case, layout):
  """All layouts of every case take minutes to compile: each case has tiles and one mesh, and the rest is extra."""
  if (case, layout) in FAST:
    return ()
  turn = ("gather", "ring")[list(CASES).index(case) % 2]
  return pytest.mark.slow if layout in ("single, tiles", turn) else (pytest.mark.slow, pytest.mark.extra)


def made(case, layout, dtype=jnp.float64):
  """The library's loss as a function of image, text, scale and bias."""
  _, _, loss, options, sides = CASES[case]
  devices, where = LAYOUTS[layout]
  takes_bias = loss in (losses.softmax_loss, losses.sigmoid_loss)
  names, arrays = list(sides), [jnp.asarray(side, None if side.dtype == np.int32 else dtype) for side in sides.values()]

  def local(image, text, scale, bias, *arrays):
    more = dict(zip(names, arrays, strict=True)) | ({"logit_bias": bias} if takes_bias else {})
    axes = {"axis_name": BATCH_AXES} if devices else {}
    return loss(image, text, logit_scale=scale, **options, **where, **axes, **more)[0]

  if devices:
    pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    mesh = MeshSpec().make(jax.devices()[:devices])
    specs = (pairs, pairs, everywhere, everywhere, *[pairs] * len(arrays))
    local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere)
  return lambda image, text, scale, bias: local(image, text, scale, bias, *arrays)


def along(function, point, direction):
  return lambda t: function(*(p + t * d for p, d in zip(point, direction, strict=True)))


def second_difference(function, step=2e-3):
  """The second derivative at 0, exact to the sixth order of the step."""
  weights = {0: -49 / 18, 1: 3 / 2, 2: -3 / 20, 3: 1 / 90}
  total = sum(w * (function(k * step) + (function(-k * step) if k else 0)) for k, w in weights.items())
  return total / step**2


@pytest.mark.parametrize(
  ("case", "layout"),
  [pytest.param(case, layout, marks=marks(case, layout)) for case in CASES for layout in LAYOUTS],
)
def test_second_derivatives_equal_differences_in_extended_precision(case, layout, rng):
  reference, options, *_ = CASES[case]
  image, text = unit(rng, 2, PAIRS, DIM)
  point = image, text, np.float64(6.0), np.float64(-2.0)
  alone = [np.zeros_like(image), np.zeros_like(text), np.float64(1), np.float64(0)]
  together = [rng.normal(size=image.shape), rng.normal(size=text.shape), np.float64(0.7), np.float64(-0.4)]
  with jax.enable_x64(True):
    loss = made(case, layout)

    @jax.jit
    def derivatives(point, direction):
      gradient = jax.grad(along(loss, point, direction))
      forward = jax.jvp(gradient, (jnp.float64(0),), (jnp.float64(1),))[1]
      return gradient(0.0), jax.grad(gradient)(0.0), forward

    for direction in (alone, together):
      path = along(functools.partial(reference, **options), [np.longdouble(p) for p in point], direction)
      first = (path(np.longdouble(1e-6)) - path(np.longdouble(-1e-6))) / 2e-6
      second = second_difference(lambda t, path=path: path(np.longdouble(t)))
      found = derivatives(point, direction)
      np.testing.assert_allclose(found[0], float(first), rtol=1e-8, atol=1e-9)
      np.testing.assert_allclose(found[1:], float(second), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_the_second_derivative_in_the_scale_is_a_variance(scale, rng):
  """In float32: the variance of the similarities under each softmax, a mean over both directions."""
  image, text = unit(rng, 2, PAIRS, DIM)
  cosine, expected = image @ text.T, 0.0
  for axis in (0, 1):
    p = np.exp(log_softmax(scale * cosine, axis))
    expected += np.mean((p * cosine**2).sum(axis) - (p * cosine).sum(axis) ** 2) / 2
  loss = made("softmax", "single", jnp.float32)
  arguments = jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32), jnp.float32(scale), jnp.float32(0)
  second = jax.jit(jax.grad(jax.grad(loss, argnums=2), argnums=2))(*arguments)
  assert second == pytest.approx(expected, rel=2e-3, abs=1e-7)
  hessian = jax.jit(jax.hessian(lambda both: loss(*arguments[:2], both[0], both[1])))(jnp.array([scale, 3.0]))
  np.testing.assert_allclose(hessian, [[expected, 0], [0, 0]], rtol=2e-3, atol=1e-7)


def test_the_second_derivative_of_the_sigmoid_where_logits_are_zero():
  """Each of four logits of 0 contributes 1/4, squared cosine included, whichever branch is taken at 0."""
  zeros = jnp.zeros((2, 3))

  def loss(bias):
    return losses.sigmoid_loss(zeros, zeros, logit_scale=5.0, logit_bias=bias)[0]

  assert jax.grad(jax.grad(loss))(0.0) == pytest.approx(4 * 0.25 / 2, rel=1e-6)


@functools.cache
def extra_negatives(coefficient, present):
  """Value, gradients and second derivative in the scale of a softmax loss, compiled once for all inputs."""

  def loss(image, text, scale, group, extra=None):
    more = {} if extra is None else {"image_extra": extra, "text_extra": extra}
    how = {"positive_coefficient": coefficient, "group": group}
    return losses.weighted_softmax_loss(image, text, logit_scale=scale, **how, **more)[0]

  if not present:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

  @jax.jit
  def derivatives(*given):
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 4))(*given)
    return value, gradients, jax.grad(jax.grad(loss, argnums=2), argnums=2)(*given)

  return derivatives


@pytest.mark.parametrize("coefficient", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("side", ["neither", "some", "rows", "all"])
def test_gradients_are_finite_where_nothing_counts(side, coefficient, scale, rng):
  """Extra negatives of minus infinity count nothing: value and gradients are those without them."""
  image, text = (jnp.asarray(rows, jnp.float32) for rows in unit(rng, 2, 6, 4))
  extra = rng.uniform(-1, 1, (6, 3)).astype(np.float32)
  {"neither": lambda: None, "some": lambda: extra[:, 1].fill(-np.inf), "rows": lambda: extra[:2].fill(-np.inf),
   "all": lambda: extra.fill(-np.inf)}[side]()  # fmt: skip
  # With one group there are no negatives in the batch, and with one a pair all others are.
  for group in (jnp.arange(6, dtype=jnp.int32), jnp.zeros(6, jnp.int32)):
    given = image, text, scale, group
    value, gradients, second = extra_negatives(coefficient, True)(*given, jnp.asarray(extra))
    assert np.isfinite(value) and all(np.isfinite(part).all() for part in gradients) and np.isfinite(second)
    assert not np.asarray(gradients[3])[np.isneginf(extra)].any()
    if side == "all":
      plain, expected = extra_negatives(coefficient, False)(*given)
      assert value == pytest.approx(float(plain), rel=1e-6, abs=1e-7)
      for part, known in zip(gradients, expected, strict=False):
        np.testing.assert_allclose(part, known, rtol=1e-5, atol=1e-6)


@functools.cache
def all_derivatives(loss):
  """First derivatives of a loss, and those of their squared length, compiled once for all inputs."""
  function = {**losses.OBJECTIVES, **losses.DISTILLATIONS}[loss]
  bias = {"logit_bias": 0.0} if loss in losses.OBJECTIVES else {}

  def value(image, text, scale, *teacher):
    return function(image, text, *teacher, logit_scale=scale, tile=4, **bias)[0]

  gradient = jax.grad(value, argnums=(0, 1, 2))
  second = jax.grad(lambda *a: sum(jnp.vdot(part, part) for part in gradient(*a)), argnums=(0, 1, 2))
  return jax.jit(lambda *a: (*gradient(*a), *second(*a)))


@pytest.mark.parametrize("layout", ["zero", "equal", "opposite"])
@pytest.mark.parametrize(
  "loss",
  [
    "softmax",
    *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("sigmoid", "distill_similarity", "distill_relational")),
  ],
)
def test_all_derivatives_are_finite_at_the_largest_scale(loss, layout, rng):
  rows = unit(rng, 6, 4).astype(np.float32)
  image, text = {"zero": (0 * rows, 0 * rows), "equal": (rows, rows), "opposite": (rows, -rows)}[layout]
  teacher = () if loss in losses.OBJECTIVES else (jnp.asarray(rows[::-1]), jnp.asarray(rows))
  for part in all_derivatives(loss)(jnp.asarray(image), jnp.asarray(text), jnp.float32(100.0), *teacher):
    assert np.isfinite(part).all()
