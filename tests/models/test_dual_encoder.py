import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.models.layers import l2_normalize

LOGICAL_NAMES = {"layers", "embed", "mlp", "heads", "vocab", None}


@pytest.mark.parametrize("preset", ["clip_b32", "siglip_b16"])
def test_logical_axes_name_every_dimension(preset):
  config = presets.resolve(preset)
  _, shapes = dual_encoder.abstract(config)
  axes = dual_encoder.logical_axes(config)

  def check(path, shape, names):
    path = tuple(key.key for key in path)
    assert len(names) == len(shape.shape), path
    assert set(names) <= LOGICAL_NAMES, path
    assert shape.dtype == jnp.float32, path
    assert dual_encoder.is_stacked(path) == (names[:1] == ("layers",)), path
    if dual_encoder.is_stacked(path):
      assert shape.shape[0] == config.image.transformer.depth
    # Weight decay tells kernels and tables from the rest by their dimensions.
    decayed = len(shape.shape) - dual_encoder.is_stacked(path) >= 2
    assert decayed == (path[-1] in ("kernel", "tokens", "position")), path

  jax.tree_util.tree_map_with_path(check, shapes, axes)
  assert axes["text"]["tokens"] == ("vocab", "embed")
  assert axes["image"]["transformer"]["blocks"]["attention"]["qkv"]["kernel"] == ("layers", "embed", "heads")


@pytest.fixture(scope="module")
def initialised(tiny):
  config = tiny("clip_b32", transformer={"width": 64, "mlp_dim": 256}, text={"vocab_size": 200})
  return config, jax.jit(lambda key: dual_encoder.init(config, key))(jax.random.key(0))


def test_init_fills_the_abstract_tree(initialised):
  config, params = initialised
  _, shapes = dual_encoder.abstract(config)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), shapes
  )


def test_clip_init_has_the_published_scales(initialised):
  _, params = initialised
  blocks, width, depth = params["text"]["transformer"]["blocks"], 64, 2
  expected = {
    ("attention", "qkv"): width**-0.5,
    ("attention", "out"): width**-0.5 * (2 * depth) ** -0.5,
    ("mlp", "up"): (2 * width) ** -0.5,
    ("mlp", "down"): width**-0.5 * (2 * depth) ** -0.5,
  }
  for (branch, name), std in expected.items():
    assert np.std(blocks[branch][name]["kernel"]) == pytest.approx(std, rel=0.05)
    assert not blocks[branch][name]["bias"].any()
  assert np.std(params["text"]["tokens"]) == pytest.approx(0.02, rel=0.05)
  assert np.std(params["text"]["position"]) == pytest.approx(0.01, rel=0.2)
  assert np.exp(params["log_logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)
  # Stacked layers are drawn independently.
  first, second = blocks["mlp"]["up"]["kernel"]
  assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_bfloat16_keeps_float32_parameters_and_outputs(tiny, random_params, captions):
  embeddings = {}
  for dtype in ("float32", "bfloat16"):
    config = tiny(dtype=dtype)
    graphdef, shapes = dual_encoder.abstract(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    model = dual_encoder.merge(graphdef, random_params(config))
    assert jax.eval_shape(model.text, *captions([7, 3])).states.dtype == dtype
    embeddings[dtype] = jax.jit(model.encode_text)(*captions([7, 3]))
  rough, exact = embeddings["bfloat16"], embeddings["float32"]
  assert rough.dtype == jnp.float32
  assert 1e-6 < np.abs(rough - exact).max() < 0.1
  np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, rtol=1e-5)


def test_zero_projection_has_finite_gradients(tiny, random_params, captions):
  config = tiny("clip_b32")
  params = random_params(config)
  graphdef, _ = dual_encoder.abstract(config)
  params["text"]["projection"] = jax.tree.map(jnp.zeros_like, params["text"]["projection"])

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def differentiate(params, tokens, mask):
    embeddings = dual_encoder.merge(graphdef, params).encode_text(tokens, mask)
    return jnp.sum(embeddings * jnp.arange(16)), embeddings

  gradients, embeddings = differentiate(params, *captions([7, 3]))
  assert not embeddings.any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert np.abs(gradients["text"]["projection"]["kernel"]).max() > 0  # It can leave zero.


def test_normalisation_is_exact_away_from_zero(rng):
  x = rng.standard_normal((3, 5)).astype(np.float32) * np.float32([[1e-4], [1], [1e4]])
  np.testing.assert_allclose(l2_normalize(jnp.asarray(x)), x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5)
