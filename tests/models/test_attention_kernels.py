"""The kernels of TPUs and GPUs, run by Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.models.attention_kernels import splash, triton
from contrastive_jax.models.attention_rows import attend_in_rows
from tests.models import attention_reference as reference
from tests.models.test_attention import draw, with_gradients

KERNELS = {"splash": splash, "triton": triton}
# Five blocks of 128, with segments that end inside of one and at its end; and a length that must be filled up.
BOUNDS = [0, 60, 128, 131, 450, 560, 640]
CASES = {
  "segment_ids": (640, 80, {"causal": False}, BOUNDS),
  "causal segments": (640, 64, {"causal": True}, BOUNDS),
  "causal": (640, 16, {"causal": True}, None),
  "odd length": (150, 16, {"causal": False}, None),
  "odd length, causal segments": (150, 16, {"causal": True}, [0, 129, 150]),
}


def rules_of(case):
  length, head_dim, rules, bounds = CASES[case]
  segment_ids = (
    None if bounds is None else np.repeat(np.arange(1, len(bounds)) % (len(bounds) - 1), np.diff(bounds))[None]
  )
  return (
    length,
    head_dim,
    rules,
    segment_ids if segment_ids is None else np.concatenate([segment_ids, segment_ids[:, ::-1]]),
  )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_formulas(kernel, case, rng):
  length, head_dim, rules, segment_ids = rules_of(case)
  parts = draw(rng, 2, length, 1, head_dim)
  expected, _, expected_gradients = reference.attention(
    *parts, np.broadcast_to(reference.seen(length, segment_ids=segment_ids, **rules), (2, length, length))
  )
  given = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int16)
  run = lambda *parts: KERNELS[kernel](*parts, segment_ids=given, interpret=True, **rules)  # noqa: E731
  output, gradients = with_gradients(run, parts)
  np.testing.assert_allclose(output, expected, atol=1e-5)
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_segment_never_matters(kernel, rng):
  length, _, _, segment_ids = rules_of("segment_ids")
  parts = draw(rng, 2, length, 1, 16)
  run = lambda *parts: KERNELS[kernel](*parts, segment_ids=jnp.asarray(segment_ids), interpret=True)  # noqa: E731
  changed = jnp.asarray(segment_ids == 2)[..., None, None]
  others = [*(jnp.where(changed, 100 * part + 1, part) for part in parts[:3]), parts[3]]
  before, after = with_gradients(run, parts), with_gradients(run, others)
  unchanged = segment_ids != 2
  np.testing.assert_array_equal(before[0][unchanged], after[0][unchanged])
  for ours, theirs in zip(before[1], after[1], strict=True):
    np.testing.assert_array_equal(ours[unchanged], theirs[unchanged])


def test_splash_skips_blocks_of_other_segments(rng):
  """Weights of zero would not hide a NaN: blocks of 128 that a query block cannot see are never multiplied."""
  queries, keys, values, _ = draw(rng, 1, 640, 1, 16)
  segment_ids = jnp.asarray(np.repeat([1, 2, 3], [256, 128, 256])[None])
  run = lambda *parts: splash(*parts, segment_ids=segment_ids, interpret=True)  # noqa: E731
  poisoned = jnp.where(segment_ids[..., None, None] == 2, jnp.nan, 1)
  others = np.asarray(segment_ids != 2)
  output, gradients = with_gradients(
    run, [queries, keys, values * poisoned, queries * (segment_ids != 2)[..., None, None]]
  )
  assert np.isfinite(output[others]).all() and np.isnan(output[~others]).all()
  for gradient in gradients:
    assert np.isfinite(gradient[others]).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel, rng):
  length, head_dim, rules, segment_ids = rules_of("causal segments")
  parts = draw(rng, 2, length, 1, head_dim, dtype=jnp.bfloat16)
  expected, _, gradients = reference.attention(
    *(part.astype(jnp.float32) for part in parts), reference.seen(length, segment_ids=segment_ids, **rules)
  )
  run = lambda *parts: KERNELS[kernel](*parts, segment_ids=jnp.asarray(segment_ids), interpret=True, **rules)  # noqa: E731
  output, ours = with_gradients(run, parts)
  assert output.dtype == jnp.bfloat16
  np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.03)
  for mine, theirs in zip(ours, gradients, strict=True):
    np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.01 * np.abs(theirs).max())


def in_rows(queries, keys, values, segment_ids=None, causal=False):
  rows, length, heads, _ = queries.shape
  flat = (part.reshape(rows, length, -1) for part in (queries, keys, values))
  return attend_in_rows(*flat, segment_ids, heads, causal, True).reshape(queries.shape)


# Two heads in a tile of lanes, heads that lie across tiles, several that do not fill one, and one that does.
@pytest.mark.parametrize(
  ("heads", "head_dim", "causal"), [(4, 64, False), (3, 72, True), (2, 16, True), (2, 128, False)]
)
def test_short_rows_equal_the_formulas(heads, head_dim, causal, rng):
  length, segment_ids = 21, None if head_dim == 64 else np.repeat([[1, 2, 0], [1, 1, 2]], 7, axis=1)
  parts = draw(rng, 2, length, heads, head_dim)
  seen = np.broadcast_to(reference.seen(length, causal=causal, segment_ids=segment_ids), (2, length, length))
  expected, _, expected_gradients = reference.attention(*parts, seen)
  given = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int16)
  output, gradients = with_gradients(lambda *parts: in_rows(*parts, given, causal), parts)
  np.testing.assert_allclose(output, expected, atol=1e-5)
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
def test_another_segment_of_a_short_row_never_matters(rng):
  segment_ids = np.repeat([[1, 2, 0], [1, 1, 2]], 7, axis=1)
  parts = draw(rng, 2, 21, 2, 72)
  changed = jnp.asarray(segment_ids == 2)[..., None, None]
  others = [*(jnp.where(changed, 100 * part + 1, part) for part in parts[:3]), parts[3]]
  run = lambda *parts: in_rows(*parts, jnp.asarray(segment_ids))  # noqa: E731
  before, after = with_gradients(run, parts), with_gradients(run, others)
  unchanged = segment_ids != 2
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[unchanged], b[unchanged]), before, after)
