"""Views: geometry and colour against closed forms, and each by its own draws only."""

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from data.augment import DRAWINGS, DRAWS, PHOTOGRAPHS, Augment


def draws_of(count, value=0.5, **columns):
  draws = np.full((count, DRAWS), value)
  for column, number in columns.items():
    draws[:, int(column[1:])] = number
  return draws


@pytest.fixture
def drawing(rng):
  image = np.zeros((20, 20, 4), np.uint8)
  image[4:16, 4:16, 3] = 255
  image[4:16, 4:16, :3] = rng.integers(0, 256, (12, 12, 3))
  return image


@pytest.fixture
def photograph(rng):
  return rng.integers(0, 256, (30, 20, 3), np.uint8)


def test_without_chance_a_drawing_is_itself_on_white(drawing):
  view = Augment()([drawing], [True], 20, draws_of(1))[0]
  expected = np.where(drawing[..., 3:] > 0, drawing[..., :3], 255)
  np.testing.assert_array_equal(view, expected)


def test_without_chance_a_photograph_is_its_middle_square(photograph):
  view = Augment()([photograph], [True], 20, draws_of(1))[0]
  np.testing.assert_array_equal(view, photograph[5:25])


def test_a_mirrored_view_is_the_mirror_image(drawing):
  augment = Augment(flip=1.0)
  plain, mirrored = augment([drawing, drawing], [False, True], 20, draws_of(2))
  np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_a_shift_moves_the_drawing(drawing):
  plain = Augment()([drawing], [False], 20, draws_of(1))[0]
  moved = Augment(shift=0.1)([drawing], [False], 20, draws_of(1, _4=1.0, _5=0.5))[0]
  np.testing.assert_array_equal(moved[:, 2:], plain[:, :-2])


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_a_crop_stays_inside_of_a_photograph(photograph, corner):
  view = Augment(zoom=(2.0, 2.0))([photograph], [False], 20, draws_of(1, _4=corner, _5=corner))[0]
  small = photograph[:10, :10] if corner else photograph[-10:, -10:]
  # Bilinear samples at quarter pixels are means of neighbours.
  inner = small[1:-1, 1:-1].astype(float)
  assert np.abs(view[2:-2:2, 2:-2:2].astype(float) - inner).mean() < 60
  assert np.corrcoef(view[::2, ::2].ravel(), small.ravel())[0, 1] > 0.8


def resized(pixels, size):
  """Bilinear, with pixels as squares whose borders fall together; what lies outside repeats the border."""
  for axis in (0, 1):
    length = pixels.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = np.minimum(at.astype(int), length - 1)
    share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    high = np.minimum(low + 1, length - 1)
    pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
  return pixels


def test_an_upright_view_of_a_photograph_is_a_crop_of_whole_pixels_resized(rng):
  size, draws = 24, rng.random((40, DRAWS))
  pictures = [rng.integers(0, 256, (int(h), int(w), 3), np.uint8) for h, w in rng.integers(24, 38, (40, 2))]
  views = Augment(zoom=(1.0, 1.5), flip=0.5)(pictures, [True] * 40, size, draws)
  for picture, view, u in zip(pictures, views, draws, strict=True):
    shown = min(picture.shape[:2]) / (1 + 0.5 * u[0])
    mirrored = u[6] < 0.5
    # What a draw moves is the mirrored picture.
    shares = 1 - u[5], u[4] if mirrored else 1 - u[4]
    borders = [(length - shown) * share for length, share in zip(picture.shape[:2], shares, strict=True)]
    down, across = (slice(round(start), round(start + shown)) for start in borders)
    expected = resized(picture[down, across].astype(np.float64), size)
    expected = expected[:, ::-1] if mirrored else expected
    assert np.abs(view - expected).max() <= 1


def test_strong_reduction_averages():
  board = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
  view = Augment()([np.dstack([board] * 3)], [False], 16, draws_of(1))[0]
  assert np.abs(view.astype(int) - 128).max() <= 8


def test_grey_is_the_luma(photograph):
  view = Augment(grey=1.0)([photograph], [False], 20, draws_of(1))[0]
  luma = photograph[5:25] @ np.array([0.299, 0.587, 0.114])
  assert np.abs(view - luma[..., None]).max() <= 1


def test_saturation_contrast_and_brightness(photograph):
  augment = Augment(colour=1.0, hue=0.0, saturation=(0.5, 0.5), contrast=(0.8, 0.8), brightness=10.0)
  view = augment([photograph], [False], 20, draws_of(1, _11=1.0))[0]
  pixels = photograph[5:25].astype(float)
  luma = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
  expected = 0.8 * (0.5 * pixels + 0.5 * luma) + 0.2 * 127.5 + 10
  assert np.abs(view - expected.clip(0, 255)).max() <= 1


def test_a_hue_rotation_keeps_grey_and_turns_red_to_green():
  image = np.zeros((2, 2, 3), np.uint8)
  image[0], image[1] = (255, 0, 0), 77
  augment = Augment(colour=1.0, hue=120.0, saturation=(1.0, 1.0), contrast=(1.0, 1.0), brightness=0.0)
  view = augment([image], [False], 2, draws_of(1, _8=1.0))[0]
  np.testing.assert_allclose(view[0], np.broadcast_to((0, 255, 0), (2, 3)), atol=1)
  np.testing.assert_allclose(view[1], 77, atol=1)


def test_colour_changes_leave_the_background_alone(drawing):
  augment = Augment(colour=1.0, background=1.0)
  draws = draws_of(1, _11=1.0, _18=0.0)
  draws[0, 19:22] = 10 / 255, 20 / 255, 30 / 255
  view = augment([drawing], [False], 20, draws)[0]
  np.testing.assert_array_equal(view[:3, :3], np.broadcast_to((10, 20, 30), (3, 3, 3)))


def test_outlines_are_dark_and_surround_the_drawing():
  image = np.zeros((20, 20, 4), np.uint8)
  image[6:14, 6:14] = 250, 200, 0, 255
  view = Augment(outline=1.0)([image], [False], 20, draws_of(1, _14=0.0, _15=0.4, _17=0.999))[0]
  assert view[10, 5].max() < 30 and view[5, 10].max() < 30
  np.testing.assert_array_equal(view[10, 10], (250, 200, 0))
  np.testing.assert_array_equal(view[0, 0], 255)


def test_flat_fills_have_few_tones(rng):
  image = np.dstack([np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))] * 3)
  view = Augment(flatten=1.0)([image], [False], 64, draws_of(1, _12=0.0, _13=0.4))[0]
  assert len(np.unique(view)) == 4


def test_one_colour_becomes_white():
  image = np.zeros((20, 20, 4), np.uint8)
  image[4:16, 4:16] = 250, 200, 0, 255
  image[4:16, 4:8] = 0, 0, 200, 255
  view = Augment(unfill=1.0)([image], [False], 20, draws_of(1, _22=0.0))[0]
  assert (view[4:16, 8:16] == 255).all()
  np.testing.assert_array_equal(view[10, 5], (0, 0, 200))


@pytest.mark.parametrize("augment", [DRAWINGS, PHOTOGRAPHS])
def test_a_view_depends_on_its_own_draws_only(rng, augment, drawing, photograph):
  images = [drawing, photograph, drawing[2:, 1:], photograph[:15]] * 8
  draws = rng.random((32, DRAWS))
  together = augment(images, [True] * 32, 16, draws)
  for k in range(32):
    np.testing.assert_array_equal(augment(images[k : k + 1], [True], 16, draws[k : k + 1])[0], together[k])


@pytest.mark.parametrize("fields", [{"flip": 1.5}, {"zoom": (0.0, 1.0)}, {"contrast": (1.2, 0.8)}])
def test_impossible_settings_are_refused(fields):
  with pytest.raises(UserError, match=next(iter(fields))):
    Augment(**fields)


def test_each_view_has_its_own_size(drawing, photograph):
  sizes = [(20, 40), (10, 25)]
  wide, cut = Augment()([drawing, photograph], [False] * 2, sizes, draws_of(2))
  assert wide.shape == (20, 40, 3) and cut.shape == (10, 25, 3)
  # The drawing is whole, in the middle, on white; the photograph fills its frame.
  np.testing.assert_array_equal(wide[:, 10:30], np.where(drawing[..., 3:] > 0, drawing[..., :3], 255))
  assert (wide[:, :10] == 255).all() and (wide[:, 30:] == 255).all()
  scaled = Augment()([photograph], [False], [(30, 20)], draws_of(1))[0]
  np.testing.assert_array_equal(scaled, photograph)
  strip = Augment()([photograph], [False], [(6, 20)], draws_of(1))[0]
  np.testing.assert_array_equal(strip, photograph[12:18])


@pytest.mark.parametrize("augment", [Augment(), DRAWINGS, PHOTOGRAPHS])
def test_square_sizes_are_the_squares(rng, augment, drawing, photograph):
  images, draws = [drawing, photograph] * 8, rng.random((16, DRAWS))
  squares = augment(images, [True] * 16, 24, draws)
  for view, square in zip(augment(images, [True] * 16, [(24, 24)] * 16, draws), squares, strict=True):
    np.testing.assert_array_equal(view, square)


def test_turning_everything_around_turns_the_views(rng, drawing, photograph):
  # A quarter turn of image and frame exchanges the axes of all that is symmetric in them.
  augment = Augment(zoom=(0.7, 1.3), shift=0.2, unfill=1.0)
  draws = rng.random((16, DRAWS))
  turned = draws.copy()
  turned[:, [4, 5, 25, 26]] = draws[:, [5, 4, 26, 25]]
  images = [drawing, photograph] * 8
  views = augment(images, [False] * 16, [(24, 17)] * 16, draws)
  others = augment([image.swapaxes(0, 1).copy() for image in images], [False] * 16, [(17, 24)] * 16, turned)
  for view, other in zip(views, others, strict=True):
    assert np.abs(view.astype(int) - other.swapaxes(0, 1)).mean() < 2


@pytest.mark.parametrize("augment", [DRAWINGS, PHOTOGRAPHS])
def test_a_clip_is_treated_alike_in_all_frames(rng, augment, drawing, photograph):
  draws = rng.random((32, DRAWS))
  clips = [np.stack([image] * 3) for image in [drawing, photograph] * 16]
  sizes = [(int(h), int(w)) for h, w in rng.integers(8, 40, (32, 2))]
  stills = augment([clip[0] for clip in clips], [True] * 32, sizes, draws)
  for clip, still, size in zip(augment(clips, [True] * 32, sizes, draws), stills, sizes, strict=True):
    assert clip.shape == (3, *size, 3)
    np.testing.assert_array_equal(clip, np.broadcast_to(still, clip.shape))


def test_the_first_frame_says_which_colour_is_unfilled():
  frames = np.zeros((2, 20, 20, 4), np.uint8)
  frames[0, 4:16, 4:16] = 250, 200, 0, 255
  frames[1, 4:16, 4:16] = 0, 0, 200, 255
  frames[1, 5:7, 5:7] = 250, 200, 0, 255
  first, second = Augment(unfill=1.0)([frames], [False], [(20, 20)], draws_of(1, _22=0.0))[0]
  assert (first == 255).all() and (second[5:7, 5:7] == 255).all()
  np.testing.assert_array_equal(second[10, 10], (0, 0, 200))


def test_what_changes_no_colour_is_the_same_computed_or_not(rng):
  pictures = [rng.integers(0, 256, (40 + k, 60, 3), np.uint8) for k in range(6)]
  draws = rng.random((6, DRAWS))
  computed = Augment(
    flip=0.5, blur=0.5, colour=1.0, hue=0.0, saturation=(1.0, 1.0), contrast=(1.0, 1.0), brightness=0.0
  )
  left_alone = Augment(flip=0.5, blur=0.5)
  np.testing.assert_array_equal(computed(pictures, [True] * 6, 32, draws), left_alone(pictures, [True] * 6, 32, draws))
