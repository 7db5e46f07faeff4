"""Images of which patches were dropped, against whole images whose dropped patches are padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.positions import resampled


def test_positions_are_read_from_the_table_unchanged(rng):
  table = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
  # Without the last row and column no coordinate says how large the image was.
  kept = np.array([0, 1, 4])
  coords = np.stack([0 * kept, *divmod(kept, 3)], axis=-1)[None].astype(np.int16)
  found = resampled(table, coords, None, np.broadcast_to(np.int16([1, 3, 3]), coords.shape))
  np.testing.assert_array_equal(found[0], np.asarray(table)[kept])


@pytest.mark.slow
@pytest.mark.extra
def test_embeddings_and_gradients_are_those_with_padding_in_their_place(tiny, random_params, rng):
  height, width = 4, 5
  config = tiny(image={"class_token": True, "pool": "cls", "transformer": {"rope": "2d"}})
  images, length = 3, height * width
  patches = rng.integers(0, 256, (images, length, 48), np.uint8)
  coords = np.tile(np.indices((1, height, width)).reshape(3, -1).T.astype(np.int16), (images, 1, 1))
  # The last row and column of the first image are among what is dropped: no coordinate says how large it was.
  inner = np.flatnonzero((coords[0, :, 1] < height - 1) & (coords[0, :, 2] < width - 1))
  left = length // 3
  kept = np.stack([np.sort(rng.permutation(part)[:left]) for part in (inner, length, length)])
  grids = np.broadcast_to(np.int16([1, height, width]), (images, left, 3))
  some = ImageBatch(*(np.take_along_axis(leaf, kept[..., None], 1) for leaf in (patches, coords)), grids=grids)

  segment_ids = np.zeros((images, length), np.int16)
  np.put_along_axis(segment_ids, kept, 1, axis=1)
  # Padding belongs to no image, so that whole images say by a grid of their own how large they are.
  every = np.broadcast_to(np.int16([1, height, width]), (images, length, 3))
  masked = ImageBatch(patches, coords, segment_ids, grids=every)

  graphdef, _ = dual_encoder.abstract(config)
  params, towards = random_params(config), jnp.asarray(rng.normal(size=(images, 16)), jnp.float32)

  @jax.jit
  def value(params, image):
    embeddings = dual_encoder.merge(graphdef, params).encode_image(image)
    return jnp.sum(embeddings * towards), embeddings

  with jax.default_matmul_precision("highest"):
    differentiate = jax.jit(jax.grad(value, has_aux=True))
    found, expected = differentiate(params, some), differentiate(params, masked)
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5), found, expected)
