import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.models.attention import attend, fuse_heads, segment_mask, split_heads


def test_columns_of_the_fused_kernel_are_grouped_by_head(rng):
  parts = [rng.standard_normal((4, 3, 6)) for _ in range(3)]
  fused = fuse_heads(parts, heads=2)
  np.testing.assert_allclose(fused[..., :3], parts[0][..., :3])  # Queries of the first head,
  np.testing.assert_allclose(fused[..., 3:6], parts[1][..., :3])  # its keys,
  np.testing.assert_allclose(fused[..., 9:12], parts[0][..., 3:])  # and queries of the second head.
  for part, back in zip(parts, split_heads(fused, heads=2, parts=3), strict=True):
    np.testing.assert_allclose(back, part)


def test_segments_do_not_leak(rng):
  q, k, v = (jnp.asarray(rng.standard_normal((1, 7, 2, 4)), jnp.float32) for _ in range(3))
  segments = jnp.array([[1, 1, 2, 2, 2, 0, 0]])
  mixed = attend(q, k, v, mask=segment_mask(segments))
  for part in (slice(0, 2), slice(2, 5)):
    np.testing.assert_allclose(mixed[:, part], attend(q[:, part], k[:, part], v[:, part]), atol=1e-6)
  gradient = jax.grad(lambda v: attend(q, k, v, mask=segment_mask(segments))[:, :2].sum())(v)
  assert np.abs(gradient[:, :2]).min() > 0
  np.testing.assert_array_equal(gradient[:, 2:], 0)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_runs_in_float32_on_bfloat16_inputs(causal, rng):
  q, k, v = (jnp.asarray(rng.standard_normal((2, 64, 2, 8)), jnp.bfloat16) for _ in range(3))
  exact = jax.nn.dot_product_attention(*(part.astype(jnp.float32) for part in (q, k, v)), is_causal=causal)
  mixed = attend(q, k, v, causal=causal)
  assert mixed.dtype == jnp.bfloat16
  np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=0.03)


def test_a_query_that_sees_nothing_gives_a_finite_mean(rng):
  q, k, v = (jnp.asarray(rng.standard_normal((1, 3, 1, 2)), jnp.float32) for _ in range(3))
  blind = attend(q, k, v, mask=jnp.zeros((1, 1, 3), bool))
  np.testing.assert_allclose(blind, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-5)
