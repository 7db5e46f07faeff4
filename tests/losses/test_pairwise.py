"""The engine: ragged tiles, accumulators, weighted softmax, memory and what crosses the mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.reductions import LogSumExp, Sum, TopK

AXIS = "data"


def mesh_of(devices):
  return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def unit(rng, *shape):
  rows = rng.standard_normal(shape)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def on_mesh(name, devices, **options):
  def local(image, text, scale, bias):
    return losses.OBJECTIVES[name](image, text, logit_scale=scale, logit_bias=bias, axis_name=AXIS, **options)[0]

  pairs, everywhere = PartitionSpec(AXIS), PartitionSpec()
  island = jax.shard_map(
    local, mesh=mesh_of(devices), in_specs=(pairs, pairs, everywhere, everywhere), out_specs=everywhere
  )
  return jax.jit(jax.value_and_grad(island, argnums=(0, 1, 2, 3)))


def compile_for(name, devices, local, dim=64, **options):
  rows, scalar = jax.ShapeDtypeStruct((devices * local, dim), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
  return on_mesh(name, devices, **options).lower(rows, rows, scalar, scalar).compile()


@pytest.mark.parametrize(("devices", "strategy"), [(1, "ring"), (4, "ring"), (4, "gather")])
@pytest.mark.parametrize("tile", [3, 64])
def test_every_pair_is_counted_once(devices, strategy, tile, rng):
  rows, columns = rng.standard_normal((2, 28, 3)).astype(np.float32)

  def visit(row, column, fresh):
    scores = row @ column.T
    fresh = jnp.ones_like(scores, bool) if fresh is None else fresh
    summed, counted = jnp.where(fresh, scores, 0), jnp.where(fresh, scores, -jnp.inf)
    return tuple(
      (Sum(summed.sum(axis)), LogSumExp.along(axis, counted, 0.5), TopK.along(axis, counted, 4)) for axis in (1, 0)
    )

  def local(rows, columns):
    def empty():
      count, dtype = len(rows), jnp.dtype(jnp.float32)
      return Sum.empty((count,), dtype), LogSumExp.empty((count,), dtype, 0.5), TopK.empty((count, 4), dtype)

    totals = pairwise.sweep(visit, rows, columns, (empty(), empty()), axes=(AXIS,), strategy=strategy, tile=tile)
    return tuple((s.total, lse.value(), top.values) for s, lse, top in totals)

  split = PartitionSpec(AXIS)
  found = jax.jit(jax.shard_map(local, mesh=mesh_of(devices), in_specs=(split, split), out_specs=split))(rows, columns)
  scores = rows.astype(np.float64) @ columns.astype(np.float64).T
  for (total, logsumexp, top), matrix in zip(found, (scores, scores.T), strict=True):
    np.testing.assert_allclose(total, matrix.sum(1), atol=1e-5)
    np.testing.assert_allclose(logsumexp, np.log(np.exp(0.5 * matrix).sum(1)), atol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-matrix, axis=1)[:, :4], atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
  pairs=st.integers(1, 40), dim=st.integers(1, 9), tile=st.integers(1, 17), scale=st.sampled_from([0.0, 1.0, 100.0])
)
def test_tiles_change_nothing(name, pairs, dim, tile, scale):
  """Against one tile, which the other file compares with float64."""
  image, text = unit(np.random.default_rng(pairs), 2, pairs, dim).astype(np.float32)

  def run(tile):
    def loss(image, text, scale, bias):
      return losses.OBJECTIVES[name](image, text, logit_scale=scale, logit_bias=bias, tile=tile)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(image, text, scale, -2.0)

  (value, gradients), (expected, whole) = run(tile), run(None)
  assert value == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
  for gradient, reference in zip(gradients, whole, strict=True):
    assert np.isfinite(gradient).all()
    # 1e-5 of what one pair alone may contribute: at 100 the logits themselves are known to 1e-5.
    np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * max(scale, 1.0) / pairs)


def test_a_row_far_below_its_tile_keeps_its_digits():
  """Logits of 100, 0 and -100 in one tile: no shift common to the tile would serve all rows."""
  image = jnp.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], jnp.float32)
  text = jnp.array([[1, 0], [1, 0], [1, 0], [1, 0]], jnp.float32)
  logits = 100 * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T

  def cross_entropy(axis):
    largest = logits.max(axis, keepdims=True)
    return np.log(np.exp(logits - largest).sum(axis)) + largest.squeeze(axis) - np.diag(logits)

  expected = (cross_entropy(0) + cross_entropy(1)).mean() / 2
  for tile in (None, 2):
    assert losses.softmax_loss(image, text, logit_scale=100.0, tile=tile)[0] == pytest.approx(expected, rel=1e-6)


class TestWeightedSoftmax:
  """Against a dense float64 formula of the general form."""

  def reference(self, image, text, scale, *, coefficient=1.0, weight=1.0, factors=1.0, extra=None):
    similarities = image @ text.T
    own = np.eye(len(image), dtype=bool)
    losses_of = []
    for matrix in (similarities, similarities.T):
      terms = np.where(own, coefficient, factors) * np.exp(scale * matrix)
      total = terms.sum(1) + (0 if extra is None else np.exp(scale * extra).sum(1))
      losses_of.append(np.log(total) - weight * scale * np.diag(matrix))
    return np.mean(losses_of)

  @pytest.mark.parametrize("strategy", ["gather", "ring"])
  @pytest.mark.parametrize("case", ["decoupled", "weighted", "extra"])
  def test_equals_the_formula_and_its_differences(self, case, strategy, rng):
    image, text = unit(rng, 2, 8, 4)
    importance, extra = rng.uniform(0.5, 2, 8), rng.uniform(-1, 1, (8, 3))
    own_options, options = {
      "decoupled": ({"coefficient": 0.0}, {"positive_coefficient": 0.0}),
      "weighted": ({"weight": 0.7, "factors": np.abs(importance[:, None] - importance) / 7}, {"positive_weight": 0.7}),
      "extra": ({"extra": extra}, {}),
    }[case]

    def weights(rows, columns, logits):
      apart = jnp.abs(rows[:, None] - columns[None, :]) / 7
      return apart, apart

    def local(image, text, scale, importance, extra):
      more = {"image_extra": extra, "text_extra": extra} if case == "extra" else {}
      if case == "weighted":
        more = {"negative_weight": weights, "image_side": importance, "text_side": importance}
      return losses.weighted_softmax_loss(
        image, text, logit_scale=scale, axis_name=AXIS, strategy=strategy, tile=3, **options, **more
      )[0]

    split, everywhere = PartitionSpec(AXIS), PartitionSpec()
    island = jax.shard_map(
      local, mesh=mesh_of(2), in_specs=(split, split, everywhere, split, split), out_specs=everywhere
    )
    with jax.enable_x64(True):
      function = jax.jit(jax.value_and_grad(island, argnums=(0, 1, 2)))
      value, gradients = function(*map(jnp.asarray, (image, text, np.float64(3), importance, extra)))
    arguments = [image, text, np.float64(3)]
    assert value == pytest.approx(self.reference(*arguments, **own_options), rel=1e-12)
    for place, gradient in enumerate(gradients):
      direction, step = rng.standard_normal(np.shape(arguments[place])), 1e-5
      ahead, behind = (
        self.reference(
          *(a + sign * step * direction if i == place else a for i, a in enumerate(arguments)), **own_options
        )
        for sign in (1, -1)
      )
      assert np.sum(np.asarray(gradient) * direction) == pytest.approx(
        (ahead - behind) / (2 * step), rel=1e-7, abs=1e-9
      )

  def test_decoupled_loss_of_the_identity_is_minus_the_scale(self):
    eye = jnp.eye(2)
    loss, _ = losses.weighted_softmax_loss(eye, eye, logit_scale=100.0, positive_coefficient=0.0)
    assert loss == pytest.approx(-100.0)

  def test_an_empty_denominator_counts_nothing(self):
    def loss(image):
      group = jnp.zeros(2, jnp.int32)
      return losses.weighted_softmax_loss(image, image, logit_scale=9.0, positive_coefficient=0.0, group=group)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.eye(2))
    assert value == 0 and np.all(gradient == 0)

  def test_a_negative_coefficient_is_refused(self):
    with pytest.raises(UserError, match="positive_coefficient=-1"):
      losses.weighted_softmax_loss(jnp.eye(2), jnp.eye(2), logit_scale=1.0, positive_coefficient=-1.0)


def test_metrics_are_global(rng):
  image, text = unit(rng, 2, 16, 4).astype(np.float32)
  text[:12] = image[:12]
  split = PartitionSpec(AXIS)

  def local(image, text):
    return losses.softmax_loss(image, text, logit_scale=5.0, axis_name=AXIS)

  _, metrics = jax.jit(jax.shard_map(local, mesh=mesh_of(4), in_specs=(split, split), out_specs=PartitionSpec()))(
    image, text
  )
  similarities = image @ text.T
  for name, matrix in (("image_to_text", similarities), ("text_to_image", similarities.T)):
    assert metrics[f"accuracy_{name}"] == pytest.approx(np.mean(matrix.argmax(1) == np.arange(16)))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_temporary_memory_is_one_tile_not_the_matrix(name):
  small, large = (compile_for(name, 1, pairs, tile=256).memory_analysis().temp_size_in_bytes for pairs in (2048, 8192))
  # Five tiles, of logits or of embeddings, and vectors with an entry a pair.
  assert small < 5 * 256 * 256 * 4 + 20 * 2048 * 4
  assert large < small + 16 * 8192 * 4


def test_the_order_of_the_ring_changes_nothing(rng):
  """Any cycle through all devices brings every block everywhere."""
  image, text = unit(rng, 2, 32, 5).astype(np.float32)
  scalars = jnp.float32(9), jnp.float32(-2)
  for name in ("softmax", "sigmoid"):
    plain = on_mesh(name, 8, strategy="ring")(image, text, *scalars)
    snake = on_mesh(name, 8, strategy="ring", ring_order=(0, 1, 2, 3, 7, 6, 5, 4))(image, text, *scalars)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), snake, plain)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_ring_memory_does_not_grow_with_devices(name):
  two, eight = (compile_for(name, n, 256, strategy="ring").memory_analysis().temp_size_in_bytes for n in (2, 8))
  assert eight <= 1.1 * two


# Arrays that a device sends by each collective, with N local pairs and embeddings of D numbers. In the ring, the
# permutes in the loop run once a device; only those that bring home what was summed for the texts stand outside it. One
# row holds the groups; three hold a running log-sum-exp, or what the gradient needs of it.
N, D, DEVICES = 32, 8, 4
ALL = N * DEVICES
TRAFFIC = {
  ("sigmoid", "ring"): {"collective-permute": {(N, D): 3, (1, N): 1}},
  ("softmax", "ring"): {"collective-permute": {(N, D): 4, (1, N): 2, (3, N): 3}},
  ("sigmoid", "gather"): {"all-gather": {(ALL, D): 1, (1, ALL): 1}, "reduce-scatter": {(N, D): 1}},
  ("softmax", "gather"): {
    "all-gather": {(ALL, D): 1, (1, ALL): 1, (3, ALL): 1},
    "all-to-all": {(3, N): DEVICES},
    "reduce-scatter": {(N, D): 1},
  },
}


@pytest.mark.parametrize(("name", "strategy"), list(TRAFFIC))
def test_only_the_expected_arrays_cross_the_mesh(name, strategy):
  text = compile_for(name, DEVICES, N, dim=D, strategy=strategy, tile=16).as_text()
  found = {}
  pattern = r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
  for shapes, kind in re.findall(pattern, text):
    for shape in re.findall(r"(?:f32|s32|u32)\[([\d,]*)\]", shapes):
      size = tuple(int(n) for n in shape.split(",") if n)
      found.setdefault(kind, {}).setdefault(size, 0)
      found[kind][size] += 1
  # Scalars are summed over all devices, nothing of the size of the batch is.
  assert set(found.pop("all-reduce")) == {()}
  assert found == TRAFFIC[name, strategy]
