"""Emoji in motion: they move as the caption says, and their middle frame does not tell how."""

import pickle

import numpy as np
import pytest

from contrastive_jax.preprocess.video import Clip, choose_frames
from data import motion
from data.emoji import CaptionMix
from data.motion import COUNT, MOTIONS, NAMES, SIDE, Motion

MIDDLE = COUNT // 2


def drawing() -> np.ndarray:
  """An opaque disc, brighter on its right half than on its left, so that its orientation shows."""
  y, x = np.mgrid[:64, :64] - 31.5
  inside = x * x + y * y < 30**2
  pixels = np.zeros((64, 64, 4), np.uint8)
  pixels[..., 3] = 255 * inside
  pixels[..., :3] = (np.where(x > 0, 250, 50) * inside)[..., None]
  return pixels


def clip(name: str, draws=None) -> np.ndarray:
  return Motion(drawing(), name, np.full(8, 0.5) if draws is None else draws).read(range(COUNT)).astype(float)


def centre(frame: np.ndarray) -> np.ndarray:
  """(x, y) of the alpha's centre of mass in pixels."""
  alpha = frame[..., 3]
  y, x = np.mgrid[:SIDE, :SIDE]
  return np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()


def heading(frame: np.ndarray) -> float:
  """Direction from the centre to the bright side in degrees, clockwise on the screen from the right."""
  light = frame[..., 0]
  y, x = np.mgrid[:SIDE, :SIDE]
  bright = np.array([(light * x).sum(), (light * y).sum()]) / light.sum() - centre(frame)
  return np.degrees(np.arctan2(bright[1], bright[0]))


@pytest.mark.parametrize(
  ("name", "direction"),
  [("slide left", (-1, 0)), ("slide right", (1, 0)), ("slide up", (0, -1)), ("slide down", (0, 1))],
)
def test_sliding_goes_where_the_caption_says(name, direction):
  places = np.array([centre(frame) for frame in clip(name)])
  steps = np.diff(places, axis=0)
  # The middle of the ranges: the drawing never leaves the frame, and goes 0.425 sides in 16 equal steps.
  np.testing.assert_allclose(steps, np.outer(np.ones(16), direction) * 0.425 * SIDE / 16, atol=0.06)
  np.testing.assert_allclose(places[MIDDLE], (SIDE - 1) / 2, atol=0.05)


@pytest.mark.parametrize(("name", "sign"), [("spin clockwise", 1), ("spin counterclockwise", -1)])
def test_spinning_turns_as_the_caption_says(name, sign):
  frames = clip(name)
  turns = np.unwrap([heading(frame) for frame in frames], period=360)
  np.testing.assert_allclose(np.diff(turns), sign * 225 / 16, atol=1)
  assert abs(heading(frames[MIDDLE])) < 0.5
  places = np.array([centre(frame) for frame in frames])
  np.testing.assert_allclose(places, places[:1].repeat(COUNT, 0), atol=0.2)


@pytest.mark.parametrize(("name", "sign"), [("grow", 1), ("shrink", -1)])
def test_growing_and_shrinking_keep_the_place(name, sign):
  frames = clip(name)
  areas = frames[..., 3].sum(axis=(1, 2))
  assert (sign * np.diff(areas) > 0).all()
  # A diameter of 60 of 64 pixels, and a side that grows by 2.3 in all.
  np.testing.assert_allclose(np.log(areas[-1] / areas[0]) / 2, sign * np.log(2.3), atol=0.03)
  np.testing.assert_allclose([centre(frame) for frame in frames], (SIDE - 1) / 2, atol=0.2)


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_blinking_comes_and_goes_whatever_the_rhythm(frames, rng):
  for draws in rng.random((200, 8)):
    moving = Motion(drawing(), "blink", draws)
    seen = moving.read(choose_frames(COUNT, 8.0, frames, "uniform"))[..., 3].any(axis=(1, 2))
    assert seen.any() and not seen.all()
    assert moving.read([MIDDLE])[..., 3].any()


def test_the_middle_frame_is_the_same_whatever_the_motion(rng):
  """Place and size are drawn without regard to the motion, so that equal draws give equal middle frames, bit for bit:
  their distributions are then equal, and no classifier that sees them alone is better than chance."""
  for draws in rng.random((20, 8)):
    middles = [Motion(drawing(), name, draws).read([MIDDLE]) for name in NAMES]
    assert all(np.array_equal(middles[0], other) for other in middles)


@pytest.mark.slow
def test_draws_of_the_sets_do_not_depend_on_the_motion():
  """Means over many clips agree between the motions: nothing in a set ties the draws to what is shown."""
  tested = motion.openmoji()
  draws = np.stack([tested.images[i].draws for i in range(len(tested.images))])
  assert draws.min() >= 0 and draws.max() < 1
  for label in range(len(NAMES)):
    mine = draws[tested.labels == label]
    assert abs(mine.mean(axis=0) - 0.5).max() < 4.5 * np.sqrt(1 / 12 / len(mine))


@pytest.fixture(scope="module")
def source():
  return motion.motion_sources()["motion_noto"]


def test_a_source_is_every_drawing_in_every_motion(source):
  assert len(source) == len(source.drawings) * len(NAMES)
  example = source[9 * 50 + NAMES.index("spin clockwise")]
  assert isinstance(example.image, Clip) and not example.flip and example.id == 9 * 50 + 4
  assert example.text == source.text(example.id)
  name = source.drawings.concepts[50].name
  assert f"{name} spinning clockwise" in example.text.captions
  frames = example.image.read([3, 0, 3])
  assert frames.shape == (3, SIDE, SIDE, 4) and frames.dtype == np.uint8
  assert (frames[..., :3] <= frames[..., 3:]).all()
  np.testing.assert_array_equal(frames[0], frames[2])
  again = pickle.loads(pickle.dumps(motion.motion_sources()["motion_noto"]))[example.id]
  np.testing.assert_array_equal(again.image.read([3, 0, 3]), frames)


def test_captions_say_the_motion_and_follow_the_mix():
  source = motion.motion_sources(CaptionMix(english=0.1, aliases=0.0))["motion_twemoji"]
  for index in range(0, len(source), 311):
    ways = MOTIONS[NAMES[index % 9]]
    name = source.drawings.concepts[index // 9].name
    assert source.text(index).captions == tuple(f"{name} {way}" for way in ways)


def test_another_motion_is_a_negative_and_the_other_artist_is_not(source):
  groups = [source.text(i).group for i in range(9 * 300, 9 * 301)]
  assert len(set(groups)) == 9
  other = motion.motion_sources()["motion_twemoji"]
  concept = source.drawings.concepts[300]
  there = other.drawings.concepts.index(concept)
  assert [other.text(i).group for i in range(9 * there, 9 * there + 9)] == groups
  assert source.drawings.text(300).group not in groups


def test_the_control_shows_the_middle_frame_only():
  moving, still = motion.openmoji(), motion.openmoji(still=True)
  assert still.name == "motion_openmoji_still" and moving.classes == still.classes
  np.testing.assert_array_equal(moving.labels, still.labels)
  assert np.bincount(moving.labels).min() >= len(moving.images) // 9
  for index in (0, 7, 1000):
    middle = moving.images[index].read([MIDDLE] * 3)
    np.testing.assert_array_equal(still.images[index].read([0, 5, 16]), middle)
    assert isinstance(still.images[index], Clip)


def test_the_set_to_tune_on_shows_each_held_out_drawing_in_every_motion():
  tested = motion.heldout()
  assert len(tested.images) % 9 == 0 and (np.bincount(tested.labels) == len(tested.images) // 9).all()
  first = [tested.images[i] for i in range(9)]
  assert [each.name for each in first] == list(NAMES)
  assert all(each.drawing is first[0].drawing for each in first)
