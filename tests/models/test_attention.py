import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from contrastive_jax.errors import UserError
from contrastive_jax.models import attention as attention_module
from contrastive_jax.models.attention import attend, fuse_heads, split_heads
from contrastive_jax.models.attention_xla import blockwise, dense, mix_in_few_passes
from contrastive_jax.models.config import ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.models.layers import ParameterMaker
from contrastive_jax.models.transformer import Transformer
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding
from tests.models import attention_reference as reference

LENGTH = 13
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [3] + [4] * 3 + [0] * 2, [1] * 13], np.int16)
KEY_MASK = np.arange(LENGTH)[None, None] < np.array([9, 13])[:, None, None]
BOTH_MASK = np.random.default_rng(1).random((2, LENGTH, LENGTH)) < 0.5
BOTH_MASK |= np.eye(LENGTH, dtype=bool)
RULES = {
  "all": {},
  "causal": {"causal": True},
  "segment_ids": {"segment_ids": SEGMENTS},
  "causal segments": {"causal": True, "segment_ids": SEGMENTS},
  "keys masked": {"mask": KEY_MASK},
  "pairs masked": {"mask": BOTH_MASK, "segment_ids": SEGMENTS, "causal": True},
}


def test_columns_of_the_fused_kernel_are_grouped_by_head(rng):
  parts = [rng.standard_normal((4, 3, 6)) for _ in range(3)]
  fused = fuse_heads(parts, heads=2)
  np.testing.assert_allclose(fused[..., :3], parts[0][..., :3])  # Queries of the first head,
  np.testing.assert_allclose(fused[..., 3:6], parts[1][..., :3])  # its keys,
  np.testing.assert_allclose(fused[..., 9:12], parts[0][..., 3:])  # and queries of the second head.
  for part, back in zip(parts, split_heads(fused, heads=2, parts=3), strict=True):
    np.testing.assert_allclose(back, part)


def draw(rng, *shape, dtype=jnp.float32):
  """Queries, keys, values and a cotangent."""
  return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]


def with_gradients(function, parts):
  """Output and gradients by queries, keys and values."""
  queries, keys, values, cotangent = parts

  @jax.jit
  def run(queries, keys, values):
    output, pull = jax.vjp(function, queries, keys, values)
    return output, pull(cotangent)

  return run(queries, keys, values)


@pytest.mark.parametrize("sigmoid_length", [0, 5])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("implementation", [dense, lambda *args, **rules: blockwise(*args, **rules, block=5)])
def test_equals_the_formulas(implementation, rules, sigmoid_length, rng):
  rules = RULES[rules]
  parts = draw(rng, 2, LENGTH, 2, 4)
  seen = np.broadcast_to(reference.seen(LENGTH, **rules), (2, LENGTH, LENGTH))
  expected, _, expected_gradients = reference.attention(*parts, seen, sigmoid_length)
  rules = {name: value if name == "causal" else jnp.asarray(value) for name, value in rules.items()}
  output, gradients = with_gradients(
    lambda *parts: implementation(*parts, **rules, sigmoid_length=sigmoid_length), parts
  )
  np.testing.assert_allclose(output, expected, atol=2e-6)
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-6)


def few_passes(queries, keys, values, seen=None):
  """What `dense` is on a TPU, here."""
  heads_first = (jnp.swapaxes(part, 1, 2) for part in (queries, keys, values))
  return jnp.swapaxes(mix_in_few_passes(*heads_first, seen), 1, 2)


@pytest.mark.parametrize("rules", RULES)
def test_few_passes_equal_the_formulas(rules, rng):
  parts = draw(rng, 2, LENGTH, 2, 4)
  seen = np.broadcast_to(reference.seen(LENGTH, **RULES[rules]), (2, LENGTH, LENGTH))
  expected, _, expected_gradients = reference.attention(*parts, seen)
  given = jnp.asarray(seen)[:, None] if RULES[rules] else None
  output, gradients = with_gradients(lambda *parts: few_passes(*parts, given), parts)
  np.testing.assert_allclose(output, expected, atol=2e-6)
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_few_passes_with_blind_queries_equal_dense_attention(rng):
  """Also in the gradients: those that see nothing are a mean of the values, whatever they ask."""
  parts = draw(rng, 2, LENGTH, 2, 4)
  mask = BOTH_MASK & (np.arange(LENGTH) % 3 > 0)[:, None]
  ours = with_gradients(lambda *parts: few_passes(*parts, jnp.asarray(mask)[:, None]), parts)
  theirs = with_gradients(lambda *parts: dense(*parts, mask=jnp.asarray(mask)), parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, theirs)


def test_few_passes_survive_large_logits(rng):
  """Against float64, where every softmax is all but a maximum."""
  *parts, cotangent = draw(rng, 1, 32, 2, 8)
  parts = [30 * parts[0], 30 * parts[1], parts[2], cotangent]
  exact = reference.attention(*parts, np.ones((1, 32, 32), bool))
  output, gradients = with_gradients(few_passes, parts)
  np.testing.assert_allclose(output, exact[0], atol=2e-4)
  for ours, theirs in zip(gradients, exact[2], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("sigmoid_length", [0, 8])
@pytest.mark.parametrize("length", [32, attention_module.DENSE_LENGTH + 76])
def test_another_segment_never_matters(length, sigmoid_length, rng):
  """Bit for bit, on either side of the length from which logits are not held at once."""
  queries, keys, values, cotangent = draw(rng, 1, length, 2, 4)
  segment_ids = jnp.asarray(np.sort(np.arange(length) % 5)[None])
  rules = {"segment_ids": segment_ids, "sigmoid_length": sigmoid_length}
  changed = (segment_ids == 2)[..., None, None]
  run = jax.jit(lambda *parts: jax.vjp(lambda *parts: attend(*parts, **rules), *parts)[1](cotangent))
  forward = jax.jit(lambda *parts: attend(*parts, **rules))
  others = [jnp.where(changed, 100 * part + 1, part) for part in (queries, keys, values)]
  unchanged = np.asarray(segment_ids != 2)
  np.testing.assert_array_equal(forward(queries, keys, values)[unchanged], forward(*others)[unchanged])
  assert not np.allclose(forward(queries, keys, values)[~unchanged], forward(*others)[~unchanged])
  for before, after in zip(run(queries, keys, values), run(*others), strict=True):
    np.testing.assert_array_equal(before[unchanged], after[unchanged])


def test_a_long_row_equals_its_segments_alone(rng):
  length = 1300
  queries, keys, values, _ = draw(rng, 1, length, 1, 8)
  bounds = [0, 500, 511, 1299, length]
  segment_ids = jnp.asarray(np.repeat([3, 1, 2, 0], np.diff(bounds))[None])
  mixed = attend(queries, keys, values, segment_ids=segment_ids, causal=True)
  for start, stop in itertools.pairwise(bounds):
    part = slice(start, stop)
    alone = dense(queries[:, part], keys[:, part], values[:, part], causal=True)
    np.testing.assert_allclose(mixed[:, part], alone, atol=2e-6)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("rules", [{}, {"mask": True}, {"sigmoid_length": 9}])
def test_long_rows_on_a_mesh(tensor, rules, rng):
  parts = draw(rng, 8, 1040, 2, 4)
  segment_ids = jnp.asarray(np.sort(rng.integers(0, 3, (8, 1040)), axis=1))
  if "mask" in rules:
    rules = {"mask": jnp.asarray(rng.random((8, 1, 1040)) < 0.8)}
  mesh = MeshSpec(data=-1, fsdp=2, tensor=tensor).make()

  def run(parts, segment_ids, rules):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return with_gradients(lambda *parts: attend(*parts, segment_ids=segment_ids, **rules), parts)

  put = jax.device_put((parts, segment_ids), batch_sharding(mesh))
  sharded = jax.jit(lambda parts, segment_ids: run(parts, segment_ids, rules))(*put)
  single = with_gradients(lambda *parts: dense(*parts, segment_ids=segment_ids, **rules), parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded, single)


def test_few_passes_on_bfloat16_inputs(rng):
  """As close to float64 as dense attention, gradients too."""
  parts = draw(rng, 2, 256, 2, 8, dtype=jnp.bfloat16)
  exact = reference.attention(*parts, np.ones((2, 256, 256), bool))
  for function in (few_passes, dense):
    output, gradients = with_gradients(function, parts)
    for ours, theirs in zip((output, *gradients), (exact[0], *exact[2]), strict=True):
      assert ours.dtype == jnp.bfloat16
      np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.02 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", [dense, lambda *parts, **rules: blockwise(*parts, **rules, block=16)])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_runs_in_float32_on_bfloat16_inputs(implementation, causal, rng):
  q, k, v, _ = draw(rng, 2, 64, 2, 8, dtype=jnp.bfloat16)
  exact = jax.nn.dot_product_attention(*(part.astype(jnp.float32) for part in (q, k, v)), is_causal=causal)
  mixed = implementation(q, k, v, causal=causal)
  assert mixed.dtype == jnp.bfloat16
  np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=0.03)


def test_a_query_that_sees_nothing_gives_a_finite_mean(rng):
  q, k, v, _ = draw(rng, 1, 3, 1, 2)
  blind = attend(q, k, v, mask=jnp.zeros((1, 1, 3), bool))
  np.testing.assert_allclose(blind, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-5)


def test_sigmoid_weights_of_zero_logits(rng):
  """sigmoid(-log n) = 1 / (n + 1), of which n keys get n / (n + 1) of their mean."""
  n = 7
  _, keys, values, _ = draw(rng, 1, n, 2, 4)
  zero = jnp.zeros_like(keys)
  mixed = attend(zero, keys, values, sigmoid_length=n)
  expected = n / (n + 1) * values.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(mixed, jnp.broadcast_to(expected, mixed.shape), atol=1e-6)
  one_hot = jnp.eye(n)[None, :, None].repeat(2, axis=2)
  weights = attend(jnp.zeros_like(one_hot), one_hot, one_hot, sigmoid_length=n)
  np.testing.assert_allclose(weights, np.full((1, n, 2, n), 1 / (n + 1)), rtol=1e-6)


def test_sigmoid_weights_of_what_is_masked_are_zero_and_not_made_up_for(rng):
  n = 9
  queries, _, _, _ = draw(rng, 1, n, 1, n)
  one_hot = jnp.eye(n)[None, :, None]  # Values that show the weights.
  seen = rng.random((1, n, n)) < 0.5
  free = attend(queries, 3 * one_hot, one_hot, sigmoid_length=n)[0, :, 0]
  masked = attend(queries, 3 * one_hot, one_hot, mask=jnp.asarray(seen), sigmoid_length=n)[0, :, 0]
  np.testing.assert_array_equal(masked, jnp.where(seen[0], free, 0))


def test_sigmoid_attention_needs_the_length():
  with pytest.raises(UserError, match=r"model\.image\.transformer\.attention_length=0 to be at least 1"):
    ImageConfig(TransformerConfig(8, 1, 2, 8, attention="sigmoid"), 8, 4)
  with pytest.raises(UserError, match=r"model\.text\.transformer\.attention_length=4 has no meaning"):
    TextConfig(TransformerConfig(8, 1, 2, 8, attention_length=4), 9, 4)


def make_stack(rng, **fields):
  config = TransformerConfig(width=8, depth=2, heads=2, mlp_dim=12, **fields)
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: Transformer(config, dtype="float32", make=ParameterMaker(nnx.Rngs(params=0))))
  )
  params = jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape) * 0.4), nnx.to_pure_dict(state))
  return graphdef, params


def test_sigmoid_attention_does_not_know_an_order(rng):
  graphdef, params = make_stack(rng, attention="sigmoid", attention_length=6, attention_norm=True)
  run = jax.jit(lambda x, segment_ids: nnx.merge(graphdef, params)(x, segment_ids=segment_ids))
  x = jnp.asarray(rng.standard_normal((3, 6, 8)), jnp.float32)
  segment_ids = jnp.array([[1, 1, 2, 2, 2, 0]] * 3)
  order = rng.permutation(6)
  np.testing.assert_allclose(run(x, segment_ids)[:, order], run(x[:, order], segment_ids[:, order]), atol=1e-5)


def test_hybrid_norm_normalises_what_attention_adds(rng):
  """Scaling what attention gives out cannot change a block whose attention is normalised (but for epsilon)."""
  graphdef, params = make_stack(rng, attention_norm=True, norm="rmsnorm", norm_eps=1e-12)
  run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
  x = jnp.asarray(rng.standard_normal((1, 5, 8)), jnp.float32)
  before = run(params, x)
  out = params["blocks"]["attention"]["out"]
  params["blocks"]["attention"]["out"] = {name: 7 * value for name, value in out.items()}
  np.testing.assert_allclose(run(params, x), before, rtol=1e-4, atol=1e-5)
  graphdef, params = make_stack(rng, norm="rmsnorm")
  assert "attention_norm" not in params["blocks"] and math.isfinite(float(run(params, x).sum()))


def test_a_packed_transformer_equals_its_rows_alone(rng):
  graphdef, params = make_stack(rng, causal=True)
  run = jax.jit(lambda x, segment_ids=None: nnx.merge(graphdef, params)(x, segment_ids=segment_ids))
  x = jnp.asarray(rng.standard_normal((1, 7, 8)), jnp.float32)
  packed = run(x, np.array([[1, 1, 1, 2, 2, 0, 0]], np.int16))
  for part in (slice(0, 3), slice(3, 5)):
    np.testing.assert_allclose(packed[:, part], run(x[:, part]), atol=1e-5)
