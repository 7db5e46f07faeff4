import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder

GRIDS = [(2, 3), (3, 2), (1, 6), (6, 1)]
CASES = {
  "map, learned": {"vision": {"pool": "map", "position": "learned"}},
  "mean, rotary": {"transformer": {"rope": "2d"}, "vision": {"pool": "mean", "position": "none"}},
}


def _pack(images, rng):
  """Images 0 and 1 in one row and 2 and 3 in another, padded with noise; slots in another order than the rows."""
  rows, length = [(0, 1), (2, 3)], 16
  patches = rng.integers(0, 256, (2, length, 48), dtype=np.uint8)
  coords, segments = np.zeros((2, length, 3), np.int16), np.zeros((2, length), np.int16)
  for row, members in enumerate(rows):
    for segment, image in enumerate(members, 1):
      part = slice(6 * segment - 6, 6 * segment)
      patches[row, part], coords[row, part], segments[row, part] = images.patches[image], images.coords[image], segment
  return ImageBatch(patches, coords, segments, np.array([[1, 2], [0, 1], [0, 2], [1, 1]], np.int32))


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
