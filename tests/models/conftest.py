"""Tiny towers with random parameters, drawn on the host so that no test waits for an initialisation to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.models import dual_encoder, presets

TOWER = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 24}


@pytest.fixture(scope="session")
def tiny():
  """A preset shrunk to two blocks of width 16, 12-pixel images and 7-token captions."""

  def make(preset="siglip_b16", image=None, text=None, transformer=None, **overrides):
    transformer = {**TOWER, **(transformer or {})}
    image, text = dict(image or {}), dict(text or {})
    image_transformer = {**transformer, **image.pop("transformer", {})}
    text_transformer = {**transformer, "rope": None, **text.pop("transformer", {})}
    return presets.resolve(
      preset,
      {
        "image": {"image_size": 12, "patch_size": 4, "transformer": image_transformer, **image},
        "text": {"vocab_size": 11, "length": 7, "transformer": text_transformer, **text},
        "embed_dim": 16,
        **overrides,
      },
    )

  return make


@pytest.fixture(scope="session")
def random_params():
  """Parameters none of which is zero or one."""

  def make(config, seed=0):
    rng = np.random.default_rng(seed)
    _, shapes = dual_encoder.abstract(config)

    def draw(path, shape):
      mean = 1.0 if path[-1].key == "scale" else 0.0
      return jnp.float32(mean + 0.3 * rng.standard_normal(shape.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)

  return make


@pytest.fixture(scope="session")
def images():
  """Random images of given grids (rows, columns of patches), one a row, all of one length."""

  def make(grids, seed=0, patch_dim=48):
    rng = np.random.default_rng(seed)
    (length,) = {height * width for height, width in grids}
    patches = rng.integers(0, 256, (len(grids), length, patch_dim), dtype=np.uint8)
    coords = [[(0, *divmod(index, width)) for index in range(length)] for _, width in grids]
    return ImageBatch(patches, np.array(coords, np.int16))

  return make


@pytest.fixture(scope="session")
def captions():
  """Random captions of given lengths, padded with zeros to seven tokens."""

  def make(lengths, seed=0):
    mask = np.arange(7) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(seed).integers(1, 11, mask.shape) * mask
    return tokens.astype(np.int32), mask

  return make


@pytest.fixture(scope="session")
def encoder():
  """Compiled `(params, image, tokens, mask) -> (image embeddings, text embeddings)` of a configuration."""

  def make(config):
    graphdef, _ = dual_encoder.abstract(config)

    @jax.jit
    def encode(params, image, tokens, mask):
      model = dual_encoder.merge(graphdef, params)
      return model.encode_image(image), model.encode_text(tokens, mask)

    return encode

  return make
