import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from contrastive_jax.models import attention, attention_rows, attention_xla, layers
from contrastive_jax.models.config import TransformerConfig
from contrastive_jax.models.layers import ParameterMaker, drop_path, dropout
from contrastive_jax.models.transformer import Block, Transformer

CONFIG = TransformerConfig(width=8, depth=3, heads=2, mlp_dim=12, causal=True, remat="none")


@pytest.fixture(scope="module")
def stack():
  """Graph definition, stacked parameters and tokens."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: _transformer(CONFIG)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape) * 0.4), nnx.to_pure_dict(state))
  return graphdef, params, jnp.asarray(rng.standard_normal((5, 6, 8)), jnp.float32)


def _transformer(config):
  return Transformer(config, dtype="float32", make=ParameterMaker(nnx.Rngs(params=0)))


def _value_and_grad(run, params, x):
  return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(run(params, x))), argnums=(0, 1)))(params, x)


@pytest.fixture(scope="module")
def unrolled(stack):
  """Value and gradients of a Python loop over blocks, each cut from the stack, nothing recomputed."""
  _, params, x = stack
  block, _ = nnx.split(nnx.eval_shape(lambda: Block(CONFIG, dtype="float32", make=ParameterMaker(nnx.Rngs(params=0)))))

  def run(params, x):
    for layer in range(CONFIG.depth):
      x = nnx.merge(block, jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]))(x)
    return x

  return _value_and_grad(run, params, x)


def _same(actual, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), actual, expected)


def _of(config):
  """The function of parameters and tokens that a config's transformer computes."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: _transformer(config)))
  return lambda params, x: nnx.merge(graphdef, params)(x)


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("dots", 2), ("mlp+mix", 3)])
def test_loops_and_remat_equal_blocks_one_after_the_other(remat, unroll, stack, unrolled):
  _, params, x = stack
  run = _of(dataclasses.replace(CONFIG, remat=remat, unroll=unroll))
  _same(_value_and_grad(run, params, x), unrolled)


@pytest.mark.parametrize("in_rows", [False, True])
def test_blocks_as_on_a_tpu_equal_those_over_flattened_rows(in_rows, stack, unrolled, monkeypatch):
  for module in (layers, attention_xla, attention):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
  monkeypatch.setattr(attention, "attend_in_rows", functools.partial(attention_rows.attend_in_rows, interpret=True))
  monkeypatch.setattr(attention_xla, "_FEW_KEYS", 0)
  _, params, x = stack
  as_on_a_tpu = dataclasses.replace(CONFIG, unroll=4, attention_kernel=in_rows)
  _same(_value_and_grad(_of(as_on_a_tpu), params, x), unrolled)


def _products(jaxpr):
  """Counts the matrix products of a program, those of a loop's body once."""
  inner = sum(_products(each) for eqn in jaxpr.eqns for each in jaxprs_in_params(eqn.params))
  return inner + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


@pytest.mark.parametrize("unroll", [1, 3])
def test_what_is_kept_by_name_is_not_computed_again(unroll, stack):
  _, params, x = stack
  again = {"full": 7, "mlp+mix": 5, "qkv+mix+stream+mlp": 1}  # Of q, k, v, logits, mix, out, up; down is never needed.

  def products(remat):
    run = _of(dataclasses.replace(CONFIG, remat=remat, unroll=unroll))
    return _products(jax.make_jaxpr(jax.grad(lambda params: jnp.sum(jnp.sin(run(params, x)))))(params).jaxpr)

  for remat, extra in again.items():
    assert products(remat) - products("none") == extra * unroll, remat


@pytest.fixture(scope="module")
def run(stack):
  graphdef, params, _ = stack
  return jax.jit(lambda x: nnx.merge(graphdef, params)(x))


def test_a_later_token_never_changes_an_earlier_state(run, stack):
  x = stack[2]
  before, after = run(x), run(x.at[:, 3].multiply(-1))
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert (np.abs(before - after)[:, 3:].max(axis=(0, 2)) > 1e-4).all()


@pytest.fixture(scope="module")
def noisy(stack):
  _, params, x = stack
  config = dataclasses.replace(CONFIG, drop_path=0.5, dropout=0.2)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: _transformer(config)))
  return jax.jit(lambda keys, rows=x: nnx.merge(graphdef, params)(rows, keys=keys))


def test_dropout_and_drop_path_follow_the_key(noisy, run, stack):
  first, second = (jax.random.split(jax.random.key(seed), 5) for seed in (1, 2))
  np.testing.assert_array_equal(noisy(first), noisy(first))
  assert not np.allclose(noisy(first), noisy(second))
  clean = run(stack[2])
  assert not np.allclose(noisy(first), clean)
  np.testing.assert_allclose(noisy(None), clean, rtol=1e-6)


def test_a_row_draws_the_same_alone_and_in_any_batch(noisy, stack):
  keys = jax.random.split(jax.random.key(1), 5)
  np.testing.assert_allclose(noisy(keys)[3:4], noisy(keys[3:4], stack[2][3:4]), rtol=1e-5, atol=1e-6)


def test_layers_draw_different_noise():
  # All-equal layers under drop path alone: a row's output counts how many of its branches were kept.
  config = dataclasses.replace(CONFIG, depth=8, drop_path=0.9)
  graphdef, state = nnx.split(nnx.eval_shape(lambda: _transformer(config)))
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nnx.to_pure_dict(state))
  down = params["blocks"]["mlp"]["down"]
  down["bias"] = jnp.ones_like(down["bias"])
  rows = 64
  keys = jax.random.split(jax.random.key(0), rows)
  out = jax.jit(lambda keys: nnx.merge(graphdef, params)(jnp.zeros((rows, 1, 8)), keys=keys))(keys)
  kept = np.unique(np.round(np.asarray(out[:, 0, 0]), 4))
  assert len(kept) > 16  # One shared draw could give only as many sums as there are rates, nine.


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_noise_keeps_the_expectation(rate):
  x = jnp.ones((20_000, 1, 2))
  keys = jax.random.split(jax.random.key(0), len(x))
  by_path = drop_path(x, jnp.float32(rate), keys)
  by_feature = dropout(x, rate, keys)
  for noisy in (by_path, by_feature):
    # Four standard errors of a mean of 20,000 scaled coin flips.
    assert abs(float(noisy.mean()) - 1) < 4 * np.sqrt(rate / (1 - rate) / 20_000)
    np.testing.assert_allclose(np.unique(noisy), [0, 1 / (1 - rate)], rtol=1e-6)
  np.testing.assert_array_equal(by_path[..., 0], by_path[..., 1])
