"""Values and all gradients of both losses against plain NumPy, on any number of devices, strategy, tile and dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of

PAIRS, DIM = 24, 6
KINDS = ("random", "cone", "matched", "antipodal", "equal", "one huge logit", "zero", "one group")


def problem(rng, kind="random", pairs=PAIRS, dim=DIM, groups=0):
  """Embeddings in float64 and groups: None where all differ, a label a pair, or keys of so many groups and captions."""

  def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  image, text = (unit(rng.normal(size=(pairs, dim))) for _ in range(2))
  if isinstance(groups, tuple):
    group = keys_of(*(rng.integers(0, count, pairs) for count in groups))
  else:
    group = rng.integers(0, groups, pairs).astype(np.int32) if groups else None
  if kind == "cone":  # Cosines of about 0.9 whatever the pair, as at the start of training.
    axis = 3 * unit(rng.normal(size=(1, dim)))
    image, text = unit(image + axis), unit(text + axis)
  elif kind == "matched":
    text = image.copy()
  elif kind == "antipodal":
    text = -image
  elif kind == "equal":
    image[:] = text[:] = image[0]
  elif kind == "one huge logit":  # From a tower that is not normalised.
    image[3 % pairs] *= 30
    text[5 % pairs] = image[3 % pairs] / 30
  elif kind == "zero":
    image[::2] = 0
    text[::3] = 0
  elif kind == "one group":
    group = np.full(pairs, 3, np.int32)
  return image, text, group


def alike(group):
  """Which pairs are not each other's negatives."""
  if group.ndim == 1:
    return group[:, None] == group
  whole = group[..., 0] + group[..., 1] * 2.0**32
  return (whole[:, None] == whole).any(axis=2)


def reference(loss, image, text, scale, bias, group=None, label_smoothing=0.0):
  """Value, gradients (image, text, scale, bias) and the absolute sums of the gradients' terms.

  In extended precision: what this plain formula loses where it subtracts must not count against float64.
  """
  image, text = np.asarray(image, np.longdouble), np.asarray(text, np.longdouble)
  pairs = len(image)
  own = np.eye(pairs, dtype=bool)
  counts = own | (np.ones_like(own) if group is None else ~alike(group))
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
  size = np.abs(slope)
  gradients = scale * slope @ text, scale * slope.T @ image, np.sum(slope * cosine), np.sum(slope)
  terms = scale * size @ np.abs(text), scale * size.T @ np.abs(image), np.sum(size * np.abs(cosine)), np.sum(size)
  return value, gradients, terms


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where and how a loss is computed; no device at all is a call outside of any mesh."""

  devices: int = 0
  fsdp: int = 1
  strategy: str = "gather"
  tile: int | None = None
  dtype: str = "float32"


def computed(loss, image, text, scale, bias, group=None, layout=Layout(), **options):
  """Value and gradients, as the library has them."""
  objective = functools.partial(losses.OBJECTIVES[loss], strategy=layout.strategy, tile=layout.tile, **options)

  def alone(image, text, scale, bias, group):
    return objective(image, text, logit_scale=scale, logit_bias=bias, group=group)[0]

  def shared(image, text, scale, bias, group):
    def local(image, text, scale, bias, group):
      return objective(image, text, logit_scale=scale, logit_bias=bias, group=group, axis_name=BATCH_AXES)[0]

    mesh = MeshSpec(fsdp=layout.fsdp).make(jax.devices()[: layout.devices])
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      local, mesh=mesh, in_specs=(split, split, everywhere, everywhere, split), out_specs=everywhere
    )
    return island(image, text, scale, bias, group)

  with jax.enable_x64(layout.dtype == "float64"):
    scalar = jnp.float64 if layout.dtype == "float64" else jnp.float32
    function = jax.jit(jax.value_and_grad(shared if layout.devices else alone, argnums=(0, 1, 2, 3)))
    sides = (jnp.asarray(side, layout.dtype) for side in (image, text))
    value, gradients = function(*sides, scalar(scale), scalar(bias), None if group is None else jnp.asarray(group))
    assert value.dtype == scalar and {gradient.dtype for gradient in gradients[:2]} == {jnp.dtype(layout.dtype)}
  return np.float64(value), [np.asarray(gradient, np.float64) for gradient in gradients]


def check(loss, kind, image, text, scale, bias, group, layout, **options):
  """Compares with the float64 answer for the inputs as `layout.dtype` rounds them.

  Bounds: 1e-5 (float32) or 1e-12 (float64) of the largest entry. Three things lie outside of a loss' power. Gradients
  of bfloat16 embeddings are themselves bfloat16, and so are the slopes that are multiplied: 2^-7. The rounding of a
  similarity counts `scale` times in a probability: four of them, 2.4e-5 in float32 at a scale of 100. Terms that
  cancel, as all do in a softmax over equal embeddings, leave their rounding: sixteen float32 (float64) roundings of
  their absolute sum, or two of bfloat16.
  """
  wide = layout.dtype == "float64"
  rounded = [side if wide else np.asarray(jnp.asarray(side, layout.dtype)) for side in (image, text)]
  scale, bias = (float((np.float64 if wide else np.float32)(scalar)) for scalar in (scale, bias))
  value, gradients = computed(loss, *rounded, scale, bias, group, layout, **options)
  truth, expected, terms = reference(loss, *rounded, scale, bias, group, **options)
  rounding = 2.0**-53 if wide else 2.0**-24
  tolerance = max(1e-12 if wide else 1e-5, 4 * scale * rounding)
  assert abs(value - truth) <= tolerance * max(abs(truth), 1e-6)
  for name, gradient, exact, sizes in zip(("image", "text", "scale", "bias"), gradients, expected, terms, strict=True):
    narrow = layout.dtype == "bfloat16" and name in ("image", "text")
    relative, of_terms = (2.0**-7, 2.0**-8) if narrow else (tolerance, 16 * rounding)
    bound = max(relative * max(np.abs(exact).max(), 1e-6 * scale / len(image)), of_terms * sizes.max())
    assert np.isfinite(gradient).all()
    assert np.abs(gradient - exact).max() <= bound, (name, kind, layout)


@st.composite
def cases(draw):
  devices = draw(st.sampled_from([0, 1, 2, 4, 8]))
  layout = Layout(
    devices=devices,
    fsdp=draw(st.sampled_from([size for size in (1, 2, 4) if size <= max(devices, 1)])),
    strategy=draw(st.sampled_from(["gather", "ring"])),
    tile=draw(st.sampled_from([None, 1, 3, 4, 7, 64])),
    dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16"])),
  )
  return {
    "kind": draw(st.sampled_from(KINDS)),
    "pairs": draw(st.integers(1, 7)) * max(devices, 1),
    "dim": draw(st.integers(2, 40)),
    "groups": draw(st.sampled_from([0, 9, (9, 20)])),
    "scale": draw(st.sampled_from([1.0, 7.0, 30.0, 100.0])),
    "bias": draw(st.sampled_from([-10.0, 0.0])),
    "smoothing": draw(st.sampled_from([0.0, 0.1])),
    "seed": draw(st.integers(0, 1000)),
    "layout": layout,
  }


def check_case(loss, case):
  rng = np.random.default_rng(case["seed"])
  image, text, group = problem(rng, case["kind"], case["pairs"], case["dim"], case["groups"])
  options = {"label_smoothing": case["smoothing"]} if loss == "softmax" else {}
  check(loss, case["kind"], image, text, case["scale"], case["bias"], group, case["layout"], **options)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_value_and_gradients_equal_float64(loss, case):
  check_case(loss, case)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_value_and_gradients_equal_float64_in_a_hundred_cases(loss, case):
  check_case(loss, case)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs_at_the_largest_scale(loss, kind, rng):
  image, text, group = problem(rng, kind)
  check(loss, kind, image, text, 100.0, -10.0, group, Layout(devices=4, strategy="ring", tile=4))


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
  assert computed(loss, *FIXTURE, scale, bias, **options)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pairs", "orthogonal", "paired"), [(8, 10.000363, 0.693465), (1024, 10.046488, 0.739590)])
def test_the_sigmoid_loss_at_initialisation(pairs, orthogonal, paired):
  zeros, unit = np.zeros((pairs, pairs), np.float32), np.eye(pairs, dtype=np.float32)
  assert computed("sigmoid", zeros, zeros, 10.0, -10.0)[0] == pytest.approx(orthogonal, rel=1e-6)
  assert computed("sigmoid", unit, unit, 10.0, -10.0)[0] == pytest.approx(paired, rel=1e-6)


@pytest.mark.slow
def test_the_sigmoid_loss_of_a_large_batch_at_initialisation():
  zeros = jnp.zeros((32768, 1))
  assert losses.sigmoid_loss(zeros, zeros, logit_scale=10.0, logit_bias=-10.0)[0] == pytest.approx(11.487631, rel=1e-6)


def test_a_single_group_leaves_only_the_pairs(rng):
  image, text, _ = problem(rng)
  group = np.zeros(PAIRS, np.int32)
  assert computed("softmax", image, text, 30.0, 0.0, group, Layout(devices=8))[0] == pytest.approx(0.0, abs=1e-6)


def test_keys_are_told_apart_by_both_words_and_do_not_chain(rng):
  """Pair 1 shares its group with pair 0 and its caption with pair 2, which are each other's negatives."""
  group, caption = np.array([7, 7, 8, 9]), np.array([0, 1, 1, 2])
  image, text = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32)
  for word in (0, 1):
    keys = np.full((4, 2, 2), 12, np.uint32)
    keys[..., word] = np.stack([group, caption], axis=1)
    negatives = np.array([2, 1, 2, 3])  # Of each pair; all its logits are equal.
    value, _ = computed("softmax", image, text, 2.0, 0.0, keys)
    assert value == pytest.approx(np.mean(np.log(1 + negatives)))
    value, _ = computed("sigmoid", image, text, 2.0, 0.0, keys, Layout(devices=2, strategy="ring"))
    assert value == pytest.approx(np.log1p(np.exp(-2)) + np.mean(negatives) * np.log1p(np.exp(2)))


def test_a_group_does_not_equal_the_caption_of_the_same_key(rng):
  image, text, _ = problem(rng, pairs=4)
  keys = np.stack([np.arange(4), np.arange(4)[::-1]], axis=1).astype(np.uint32)[..., None] * np.ones(2, np.uint32)
  assert computed("sigmoid", image, text, 9.0, -3.0, keys)[0] == computed("sigmoid", image, text, 9.0, -3.0)[0]


def test_wrong_options_are_named(rng):
  image, text = (jnp.asarray(rows, jnp.float32) for rows in problem(rng)[:2])
  with pytest.raises(UserError, match=r"^strategy='rings'"):
    losses.sigmoid_loss(image, text, logit_scale=1.0, logit_bias=None, strategy="rings")
  with pytest.raises(UserError, match=r"^tile=0"):
    losses.softmax_loss(image, text, logit_scale=1.0, tile=0)
  with pytest.raises(UserError, match=r"^label_smoothing=1.5"):
    losses.softmax_loss(image, text, logit_scale=1.0, label_smoothing=1.5)
