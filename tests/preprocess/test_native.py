"""Native sizes against brute force over all grids; tubelets against slices."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import join, patchify, resize
from contrastive_jax.preprocess.native import fit, fit_to_length, patchify_clip

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))
PATCHES = st.sampled_from([1, 4, 14, 16])


def stretch(grid, down, across):
  """Squared distance, in logarithms of the sides, between a grid and a size in patches."""
  return math.log(grid[0] / down) ** 2 + math.log(grid[1] / across) ** 2


@given(SIDES, SIDES, PATCHES, st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_nearest_grid_of_all_within_the_limits(height, width, patch, fewest, more):
  most = fewest + more
  fitted = fit(height, width, patch=patch, min_tokens=fewest, max_tokens=most)
  grid = fitted[0] // patch, fitted[1] // patch
  assert (grid[0] * patch, grid[1] * patch) == fitted and fewest <= grid[0] * grid[1] <= most
  area = height * width / patch**2
  scale = math.sqrt(np.clip(area, fewest, most) / area)
  wanted = height / patch * scale, width / patch * scale
  grids = [(y, x) for y in range(1, most + 1) for x in range(1, most + 1) if fewest <= y * x <= most]
  assert stretch(grid, *wanted) == pytest.approx(min(stretch(each, *wanted) for each in grids), abs=1e-12)
  assert fit(*fitted, patch=patch, min_tokens=fewest, max_tokens=most) == fitted


@pytest.mark.parametrize("size", [(400, 300), (1000, 700), (237, 1411)])
def test_aspect_and_size_are_kept_where_the_limits_allow(size):
  height, width = fit(*size, patch=14, min_tokens=16, max_tokens=16384)
  assert abs(height - size[0]) <= 7 and abs(width - size[1]) <= 7
  small = fit(*size, patch=14, max_tokens=256)
  assert small[0] / small[1] == pytest.approx(size[0] / size[1], rel=0.1)
  assert 230 <= small[0] * small[1] / 14**2 <= 256


@pytest.mark.parametrize(("size", "expected"), [((1, 1000), (14, 994)), ((10**6, 1), (14336, 14)), ((1, 1), (14, 14))])
def test_extreme_shapes(size, expected):
  assert fit(*size, patch=14, max_tokens=1024) == expected
  assert fit_to_length(*size, patch=14, length=1)[0] == 14


@given(SIDES, SIDES, PATCHES, st.integers(1, 300))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_largest_ratio_that_fits_a_length(height, width, patch, length):
  fitted = fit_to_length(height, width, patch=patch, length=length)

  def grid(ratio):
    return math.ceil(ratio * height), math.ceil(ratio * width)

  ratios = [Fraction(n, side) for side in (height, width) for n in range(1, length + 1)]
  best = max(ratio for ratio in ratios if math.prod(grid(ratio)) <= length)
  assert fitted == tuple(side * patch for side in grid(best))
  assert fit_to_length(*fitted, patch=patch, length=length) == fitted


def test_impossible_limits_are_refused():
  with pytest.raises(UserError, match="min_tokens=9 and max_tokens=4"):
    fit(10, 10, patch=4, min_tokens=9, max_tokens=4)
  with pytest.raises(UserError, match="0x10"):
    fit(0, 10, patch=4, max_tokens=4)
  with pytest.raises(UserError, match="length is 0"):
    fit_to_length(10, 10, patch=4, length=0)


def test_tubelets_are_blocks_of_a_clip(rng):
  frames = rng.integers(0, 256, (4, 6, 9, 3), np.uint8)
  patches, coords = patchify_clip(frames, 3, 2)
  assert coords.dtype == np.int16 and coords.tolist() == [
    [t, y, x] for t in range(2) for y in range(2) for x in range(3)
  ]
  for patch, (t, y, x) in zip(patches, coords, strict=True):
    block = frames[2 * t : 2 * t + 2, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
    np.testing.assert_array_equal(patch, block.ravel())
  np.testing.assert_array_equal(join(patches[None], coords, 3)[0], frames)


def test_an_image_is_a_clip_of_one_frame(rng):
  image = rng.integers(0, 256, (8, 12, 3), np.uint8)
  patches, coords = patchify_clip(image[None], 4, 1)
  batch = patchify(image[None], 4)
  np.testing.assert_array_equal(patches, batch.patches[0])
  np.testing.assert_array_equal(coords, batch.coords[0])


def test_tubelets_must_tile():
  with pytest.raises(ValueError, match="2 frames do not tile clips of 3"):
    patchify_clip(np.zeros((3, 4, 4, 3), np.uint8), 4, 2)


def test_native_sizes_are_resized_as_pillow_does(rng):
  image = rng.integers(0, 256, (70, 45, 3), np.uint8)
  height, width = fit(70, 45, patch=16, max_tokens=8)
  expected = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(resize(image, height, width), expected)
