import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder

GRIDS = [(2, 3), (3, 2), (1, 6), (6, 1)]
CASES = {
  "map, learned": {"image": {"pool": "map", "position": "learned"}},
  "mean, rotary": {"transformer": {"rope": "2d"}, "image": {"pool": "mean", "position": "none"}},
}


def _pack(images, rng):
  """Images 0 and 1 in one row and 2 and 3 in another, padded with noise; located in another order than the rows."""
  rows, length = [(0, 1), (2, 3)], 16
  patches = rng.integers(0, 256, (2, length, 48), dtype=np.uint8)
  coords, segment_ids = np.zeros((2, length, 3), np.int16), np.zeros((2, length), np.int16)
  for row, members in enumerate(rows):
    for segment, image in enumerate(members, 1):
      part = slice(6 * segment - 6, 6 * segment)
      patches[row, part], coords[row, part], segment_ids[row, part] = (
        images.patches[image],
        images.coords[image],
        segment,
      )
  return ImageBatch(patches, coords, segment_ids, np.array([[1, 2], [0, 1], [0, 2], [1, 1]], np.int32))


@pytest.mark.parametrize("case", CASES)
def test_packed_images_embed_as_alone(case, tiny, random_params, images, rng):
  config = tiny(**CASES[case])
  params = random_params(config)
  graphdef, _ = dual_encoder.abstract(config)
  encode = jax.jit(lambda image: dual_encoder.merge(graphdef, params).encode_image(image))
  alone = images(GRIDS)
  packed = encode(_pack(alone, rng))
  np.testing.assert_allclose(packed, encode(alone)[jnp.array([3, 0, 1, 2])], atol=1e-5)

  # Other pixels in a neighbour of the same row change its own embedding only.
  alone.patches[1] = 255 - alone.patches[1]
  changed = np.abs(encode(_pack(alone, rng)) - packed).max(axis=1)
  assert changed[2] > 1e-3
  assert changed[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_flows_between_packed_images(case, tiny, random_params, images, rng):
  config = tiny(**CASES[case])
  params = random_params(config)
  graphdef, _ = dual_encoder.abstract(config)
  packed = _pack(images(GRIDS), rng)

  @jax.jit
  def gradient(patches, direction):
    image = dataclasses.replace(packed, patches=patches)
    return jax.vjp(lambda image: dual_encoder.merge(graphdef, params).encode_image(image), image)[1](direction)[
      0
    ].patches

  pixels = packed.patches.astype(np.float32)
  for pair, (row, segment) in enumerate(packed.locations):
    direction = np.zeros((4, config.embed_dim), np.float32)
    direction[pair] = rng.standard_normal(config.embed_dim)
    touched = np.abs(gradient(pixels, direction)).max(axis=2) > 0
    own = (np.arange(2) == row)[:, None] & (packed.segment_ids == segment)
    np.testing.assert_array_equal(touched, own)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_a_class_token_does_not_see_the_padding(pool, tiny, random_params, images, rng):
  """One image a row with padding at the end, as in NaFlex; the table is resampled to each grid."""
  config = tiny("clip_b32", image={"pool": pool, "class_token": True})
  params = random_params(config)
  graphdef, _ = dual_encoder.abstract(config)
  encode = jax.jit(lambda image: dual_encoder.merge(graphdef, params).encode_image(image))
  alone = images(GRIDS)

  def padded(noise):
    patches = noise.integers(0, 256, (4, 9, 48), dtype=np.uint8)
    coords, segment_ids = noise.integers(0, 9, (4, 9, 3), dtype=np.int16), np.zeros((4, 9), np.int16)
    patches[:, :6], coords[:, :6], segment_ids[:, :6] = alone.patches, alone.coords, 1
    return encode(ImageBatch(patches, coords, segment_ids))

  np.testing.assert_allclose(padded(rng), encode(alone), atol=1e-5)
  np.testing.assert_array_equal(padded(np.random.default_rng(1)), padded(np.random.default_rng(2)))


def test_without_a_code_of_time_frames_are_a_set(tiny, random_params, rng):
  """Permuting the tubelets of a clip permutes the states of their tokens, and nothing else (UniViTAR)."""
  config = tiny("univitar_0.3b")
  graphdef, _ = dual_encoder.abstract(config)
  model = dual_encoder.merge(graphdef, random_params(config))
  clip = rng.integers(0, 256, (1, 3, 4, 2 * 48), dtype=np.uint8)
  coords = np.moveaxis(np.indices((3, 2, 2)), 0, -1).reshape(1, 12, 3).astype(np.int16)
  states = jax.jit(lambda patches: model.image(ImageBatch(patches.reshape(1, 12, -1), coords)).states)
  order = [2, 0, 1]
  expected = states(clip).reshape(3, 4, -1)[jnp.array(order)]
  np.testing.assert_allclose(states(clip[:, order]).reshape(3, 4, -1), expected, atol=1e-4)
  assert np.abs(states(clip).reshape(3, 4, -1) - expected).max() > 0.1


def test_a_class_token_and_packing_exclude_each_other(tiny, random_params, images, rng):
  config = tiny("clip_b32")
  graphdef, _ = dual_encoder.abstract(config)
  packed = _pack(images(GRIDS), rng)
  with pytest.raises(UserError, match="class_token"):
    dual_encoder.merge(graphdef, random_params(config)).encode_image(packed)


def test_patches_of_another_size_are_refused(tiny, random_params, images):
  config = tiny()
  graphdef, _ = dual_encoder.abstract(config)
  with pytest.raises(UserError, match=r"patches of 75 bytes.*patch_size=4"):
    dual_encoder.merge(graphdef, random_params(config)).encode_image(images([(3, 3)], patch_dim=75))
