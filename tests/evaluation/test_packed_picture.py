"""The picture of a packed batch shows every image, pixel by pixel, and where nothing is."""

import numpy as np

from contrastive_jax.evaluation import packed_picture
from contrastive_jax.preprocess import packing
from contrastive_jax.preprocess.native import patchify_clip


def test_every_image_is_in_the_picture(rng):
  grids = np.array([(1, 3, 4), (1, 5, 3), (1, 4, 4), (2, 3, 3)])
  packed = packing.pack_grids(grids, rows=3, length=34)
  colours = rng.integers(30, 220, (4, 3), np.uint8)
  frames = [np.broadcast_to(c, (t, 8 * y, 8 * x, 3)) for c, (t, y, x) in zip(colours, grids, strict=True)]
  batch = packing.place_images([patchify_clip(np.ascontiguousarray(f), 8, 1) for f in frames], packed)
  picture = packed_picture.draw(batch, patch_size=8, scale=1)
  for colour, (t, y, x) in zip(colours, grids, strict=True):
    assert (picture == colour).all(axis=2).sum() >= t * 64 * y * x
  hatched = (picture == packed_picture._HATCH).all(axis=2).sum()
  assert hatched > 100
  fewer = packed_picture.draw(batch, patch_size=8, scale=1, rows=1)
  assert fewer.shape[0] < picture.shape[0]
