"""What a trained model is shown of pictures and clips."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import images
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.video import ArrayClip
from contrastive_jax.preprocess.views import Views, gather

NATIVE = Resolution("native", min_tokens=4, max_tokens=24)


def views(resolution=NATIVE, clips=None, *, tubelet=2, frames=4) -> Views:
  return Views(4, tubelet, resolution, clips or resolution, frames)


def pixels_of(patches, coords, tubelet=1) -> np.ndarray:
  """The frames again, by placing each patch where its coordinates say."""
  t, y, x = coords.max(axis=0) + 1
  frames = np.zeros((t, tubelet, 4 * y, 4 * x, 3), np.uint8)
  for patch, (a, b, c) in zip(patches, coords, strict=True):
    frames[a, :, 4 * b : 4 * b + 4, 4 * c : 4 * c + 4] = patch.reshape(tubelet, 4, 4, 3)
  return frames.reshape(t * tubelet, 4 * y, 4 * x, 3)


def test_a_photograph_is_cropped_at_fixed_resolution_and_a_drawing_is_not(rng):
  photograph = rng.integers(0, 256, (12, 30, 3), dtype=np.uint8)
  patches, coords = views(Resolution.fixed(9))(photograph)
  np.testing.assert_array_equal(pixels_of(patches, coords)[0], images.center_crop(photograph, 9)[:8, :8])
  drawing = np.dstack([photograph, np.full((12, 30), 255, np.uint8)])
  # Opaque to the last pixel: a photograph all the same.
  np.testing.assert_array_equal(views(Resolution.fixed(9))(drawing)[0], patches)
  drawing[0, 0, 3] = 0
  shown = pixels_of(*views(Resolution.fixed(20))(drawing))[0]
  # 30 wide and 12 high: white above and below, and the whole width between.
  white = np.full((30, 30, 3), 255, np.uint8)
  white[9:21] = images.decode(drawing)
  np.testing.assert_array_equal(shown, images.resize(white, 20, 20))


def test_native_resolution_shows_the_whole_in_its_shape(rng):
  for height, width in ((9, 9), (12, 40), (300, 100), (3, 5)):
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    patches, coords = views()(picture)
    shown = pixels_of(patches, coords)[0]
    assert 4 <= len(patches) <= 24
    np.testing.assert_array_equal(shown, images.resize(picture, *shown.shape[:2]))
    assert abs(np.log(shown.shape[1] / shown.shape[0] * height / width)) < 0.5


def test_a_clip_is_its_frames_within_the_tokens(rng):
  frames = rng.integers(0, 256, (9, 16, 32, 3), dtype=np.uint8)
  patches, coords = views()(ArrayClip(frames))
  shown = pixels_of(patches, coords, tubelet=2)
  assert len(patches) <= 24 and shown.shape[0] == 4 and coords[:, 0].max() == 1
  for one, index in zip(shown, [1, 3, 5, 7], strict=True):
    np.testing.assert_array_equal(one, images.resize(frames[index], *shown.shape[1:3]))
  np.testing.assert_array_equal(views()(frames)[0], patches)


def test_frames_in_an_array_have_their_alpha_beside_their_colour(rng):
  frames = rng.integers(0, 256, (4, 8, 8, 4), dtype=np.uint8)
  shown = pixels_of(*views(Resolution.fixed(8))(frames), tubelet=2)
  alpha = frames[..., 3:] / 255
  np.testing.assert_allclose(shown, alpha * frames[..., :3] + 255 * (1 - alpha), atol=1.01)


@pytest.mark.parametrize("most", [0, 8, 7, 2])
def test_clips_at_fixed_resolution_shrink_to_the_tokens(most, rng):
  clips = Resolution("fixed", 16, max_tokens=most)
  patches, coords = views(Resolution.fixed(16), clips)(rng.integers(0, 256, (4, 20, 20, 3), dtype=np.uint8))
  side = coords[:, 1].max() + 1
  assert side == {0: 4, 8: 2, 7: 1, 2: 1}[most] and len(patches) == 2 * side**2
  assert len(patches) in views(Resolution.fixed(16), clips).lengths()


def test_naflex_fills_the_longest_sequence(rng):
  patches, _ = views(Resolution("naflex", lengths=(8, 30, 16)))(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
  assert len(patches) == 25 and views(Resolution("naflex", lengths=(8, 30, 16))).lengths() == (30,)


def test_lengths_are_few_and_near_what_is_needed():
  wide = Views(4, 2, Resolution("native", min_tokens=16, max_tokens=1000), Resolution.fixed(8), 8)
  lengths = np.array(wide.lengths())
  # The clips' 4 x 2 x 2 and the images' own.
  assert lengths[0] == 16 and lengths[-1] == 1000 and len(lengths) <= 14
  for needed in range(16, 1001):
    assert lengths[np.searchsorted(lengths, needed)] < 1.51 * needed
  assert views(Resolution.fixed(9)).lengths() == (4, 8)


def test_rows_are_padded_and_images_among_clips_become_clips(rng):
  image, clip = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
  shown = [views()(image), views()(clip)]
  batch = gather(shown, 12, width=2 * 48, padded=True)
  assert batch.patches.shape == (2, 12, 96) and batch.locations is None
  np.testing.assert_array_equal(batch.segment_ids.sum(axis=1), [4, 8])
  np.testing.assert_array_equal(batch.patches[0, :4, :48], shown[0][0])
  np.testing.assert_array_equal(batch.patches[0, :4, 48:], shown[0][0])
  np.testing.assert_array_equal(batch.coords[1, :8], shown[1][1])
  assert not batch.patches[0, 4:].any()
  assert gather(shown[:1], 4, width=48, padded=False).segment_ids is None


def test_files_are_read(tmp_path, rng):
  picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
  Image.fromarray(picture).save(tmp_path / "a.png")
  np.testing.assert_array_equal(views()(tmp_path / "a.png")[0], views()(picture)[0])


def test_frames_that_the_tubelets_do_not_divide_are_refused():
  with pytest.raises(UserError, match=r"frames=5 must be a multiple of model\.image\.tubelet=2"):
    views(frames=5)
  with pytest.raises(UserError, match="max_tokens=3 is too few for clips of 8 frames"):
    Views(4, 2, NATIVE, Resolution("native", max_tokens=3), 8)(np.zeros((8, 8, 8, 3), np.uint8))


def test_of_a_transparent_picture_only_its_rgb_is_ever_copied_whole():
  pixels = np.full((2100, 2100, 4), 128, np.uint8)
  tracemalloc.start()
  try:
    views(Resolution.fixed(16))(pixels)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  # Strips of rows come on top of three bytes a pixel; a copy with its transparency would make that seven.
  assert peak < 5 * 2100 * 2100
