"""Clips: reading frames by number from video files, animated pictures or arrays, and choosing which to read."""

import contextlib
import dataclasses
import errno
import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.preprocess.decoding import MAX_FILE_BYTES, DecodeError, check_affordable, undecodable
from contrastive_jax.preprocess.images import WHITE, decode

Frames = UInt8[np.ndarray, "frames height width channels"]
RULES = ("uniform", "random", "fps")

# How browsers play animated pictures that do not say how long a frame lasts.
_UNTIMED = 0.1
# Bytes for each pixel while a frame is decoded: of an animated picture, with its predecessors and copies; of a video.
_ANIMATION_BYTES, _VIDEO_BYTES = 32, 6
# Of the frames that a decoder keeps to make others of: H.264 has up to 16, beside the one that is converted.
_DECODER_BYTES = 24
# Pixels of all frames of an animated picture, which are all decoded to open it.
_MOST_ANIMATED = 1 << 29
# A read that fails for one of these may succeed later: the file is not to blame.
_PASSING = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


@runtime_checkable
class Clip(Protocol):
  """Random access to the frames of a moving picture.

  Attributes:
    count: number of frames, at least one.
    fps: number of frames a second.
    height: height of a frame in pixels.
    width: width of a frame in pixels.
  """

  count: int
  fps: float
  height: int
  width: int

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> Frames:
    """Reads the frames `indices`, which may repeat.

    All frames of a clip are RGB, or all are RGB multiplied by alpha, and alpha.

    Raises:
      DecodeError: if the file is bad.
      OSError: if it cannot be read.
    """
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayClip:
  """A clip that is in memory: uint8 `[frames, height, width, 3]`, or `[..., 4]` with colour multiplied by alpha."""

  frames: Frames
  fps: float = 1.0

  @property
  def count(self) -> int:
    return self.frames.shape[0]

  @property
  def height(self) -> int:
    return self.frames.shape[1]

  @property
  def width(self) -> int:
    return self.frames.shape[2]

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> Frames:
    return self.frames[np.asarray(indices, int)]


def open_clip(source: str | os.PathLike | bytes) -> Clip:
  """Opens a video (mp4, webm, whatever FFmpeg reads) or an animated picture (GIF, WebP, PNG).

  Nothing stays open: every read opens the file again, so that a clip can be pickled and read by several threads.

  Args:
    source: a path, or the bytes of a file.

  Raises:
    DecodeError: if this is no moving picture that can be read.
    OSError: if the path cannot be read.
  """
  if isinstance(source, bytes):
    if len(source) > MAX_FILE_BYTES:
      raise DecodeError(
        f"a clip of {len(source) / 1e6:,.0f} MB in a record is more than {MAX_FILE_BYTES / 1e6:,.0f} MB"
      )
    head = source[:16]
  else:
    source = os.fspath(source)
    with open(source, "rb") as file:
      head = file.read(16)
  animated = head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
  return _open_animation(source) if animated else _open_video(source)


def choose_frames(
  count: int, fps: float, frames: int, rule: str, draw: float = 0.0, *, rate: float = 0.0
) -> Int[np.ndarray, "{frames}"]:
  """Chooses which frames of a clip to look at: always as many, in order; a short clip repeats some.

  Args:
    count: number of frames of the clip.
    fps: number of frames a second of the clip.
    frames: number of frames to choose.
    rule: "uniform" takes the centres of equal parts of the clip; "random" a frame from anywhere in each of these parts;
      "fps" takes `rate` frames a second from a random beginning, and repeats the last one where the clip is over.
    draw: a uniform number in [0, 1) that decides everything random; for "fps", 0 begins with the clip.
    rate: number of frames a second, for "fps".

  Raises:
    UserError: for an unknown rule, or "fps" without a rate.

  Examples:
    >>> choose_frames(100, 25.0, 4, "uniform").tolist(), choose_frames(2, 25.0, 4, "uniform").tolist()
    ([12, 37, 62, 87], [0, 0, 1, 1])
  """
  require_known("frame_rule", rule, RULES)
  part = np.arange(frames)
  if rule == "fps":
    if not rate > 0:
      raise UserError(f"frame_rate={rate} must be above 0 frames a second for frame_rule='fps'")
    spare = max(0.0, count - frames * fps / rate)
    position = draw * spare + (part + 0.5) * fps / rate
  elif rule == "random":
    # One draw a clip, whatever the number of frames, is the seed of one a part.
    inside = np.random.Generator(np.random.Philox(key=int(draw * 2**53))).random(frames)
    position = (part + inside) * count / frames
  else:
    position = (part + 0.5) * count / frames
  # The tolerance keeps what is a whole number, such as 3 * (1 / 3), from falling below it.
  return np.minimum(np.floor(position + 1e-9).astype(np.int64), count - 1)


@dataclasses.dataclass(frozen=True)
class _Animation:
  """A file that Pillow reads; its frames build on each other, so that a read starts at the first."""

  source: str | bytes
  count: int
  fps: float
  height: int
  width: int
  transparent: bool

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> Frames:
    wanted, position = np.unique(np.asarray(indices, int), return_inverse=True)
    check_frames(len(position), self.height, self.width, 3 + self.transparent, _ANIMATION_BYTES)
    frames = np.empty((len(position), self.height, self.width, 3 + self.transparent), np.uint8)
    with _pillow(self.source) as image:
      for k, index in enumerate(wanted):
        image.seek(int(index))
        frames[position == k] = _frame(image, self.transparent)
    return frames


def _open_animation(source: str | bytes) -> _Animation:
  with _pillow(source) as image:
    count = getattr(image, "n_frames", 1)
    if count * image.width * image.height > _MOST_ANIMATED:
      raise DecodeError(f"{count} frames of {image.width}x{image.height} pixels are too many for one record")
    first = decode(image.convert("RGBA"), background=None)
    seconds = 0.0
    for index in range(count):
      image.seek(index)
      image.load()  # WebP tells durations of decoded frames only.
      seconds += image.info.get("duration", 0) / 1000 or _UNTIMED
  height, width = first.shape[:2]
  return _Animation(source, count, count / seconds, height, width, bool((first[..., 3] < 255).any()))


def _frame(image: Image.Image, transparent: bool) -> np.ndarray:
  """Converts a frame to the channels that the first one promised: GIF changes its mode from frame to frame."""
  return decode(image.convert("RGBA"), background=None if transparent else WHITE)


@contextlib.contextmanager
def _pillow(source: str | bytes) -> Iterator[Image.Image]:
  file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
  with file, _as_decode_error("animated picture"), Image.open(file) as image:
    check_affordable(image.width * image.height * _ANIMATION_BYTES, f"a frame of {image.width}x{image.height} pixels")
    yield image


@dataclasses.dataclass(frozen=True, eq=False)
class _Video:
  """A file that FFmpeg reads.

  Attributes:
    times: presentation time of each frame in the stream's units, ascending.
    entries: (presentation time, decoding time) of each keyframe, at which decoding can begin, ascending.
    fps: mean number of frames a second.
    height: height of an upright frame.
    width: width of an upright frame.
    turns: number of quarter turns counterclockwise that put the frames upright.
  """

  source: str | bytes
  times: np.ndarray
  entries: np.ndarray
  fps: float
  height: int
  width: int
  turns: int

  @property
  def count(self) -> int:
    return len(self.times)

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> Frames:
    wanted, position = np.unique(self.times[np.asarray(indices, int)], return_inverse=True)
    entry = np.maximum(np.searchsorted(self.entries[:, 0], wanted, side="right") - 1, 0)
    check_frames(len(position), self.height, self.width, 3)
    frames = np.empty((len(position), self.height, self.width, 3), np.uint8)
    with _ffmpeg(self.source) as (container, stream):
      done = 0
      for each in np.unique(entry):
        # Containers index keyframes by either time; the earlier is never behind the frames wanted.
        container.seek(int(self.entries[each].min()), stream=stream, backward=True)
        times = wanted[entry == each].tolist()
        for frame in self._decoded(container.decode(stream), times):
          frames[position == done] = frame
          done += 1
    return frames

  def _decoded(self, decoding: Iterator[av.VideoFrame], times: list[int]) -> Iterator[np.ndarray]:
    """Yields the frames on screen at ascending times, upright."""
    found = 0
    shown = None
    for frame in decoding:
      # VP8 has packets that show nothing: what was there before stays.
      while found < len(times) and shown is not None and times[found] < frame.pts:
        yield self._upright(shown)
        found += 1
      shown = frame
      if found < len(times) and times[found] == frame.pts:
        yield self._upright(shown)
        found += 1
      if found == len(times):
        return
    raise DecodeError(f"the video ends before its frame {int(np.searchsorted(self.times, times[found]))}")

  def _upright(self, frame: av.VideoFrame) -> np.ndarray:
    if frame.is_corrupt:
      raise DecodeError(f"the video is damaged at frame {int(np.searchsorted(self.times, frame.pts))}")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.turns))


def _open_video(source: str | bytes) -> _Video:
  with _ffmpeg(source) as (container, stream):
    packets = [p for p in container.demux(stream) if p.pts is not None and p.size and not p.is_discard]
    times = np.unique([p.pts for p in packets])
    entries = sorted((p.pts, p.pts if p.dts is None else p.dts) for p in packets if p.is_keyframe)
    if not entries:
      raise DecodeError("the video has no frames")
    container.seek(min(entries[0]), stream=stream, backward=True)
    first = next(iter(container.decode(stream)), None)
    if first is None:
      raise DecodeError("the video has no frame that can be decoded")
    turns = round(first.rotation / 90) % 4
    seconds = float((times[-1] - times[0]) * (stream.time_base or Fraction(1)))
    fps = (len(times) - 1) / seconds if seconds else float(stream.average_rate or 1)
    upright = (first.width, first.height) if turns % 2 else (first.height, first.width)
    return _Video(source, times, np.array(entries), fps, *upright, turns)


@contextlib.contextmanager
def _ffmpeg(source: str | bytes) -> Iterator[tuple[Any, Any]]:
  # Not by its name, in which FFmpeg finds protocols ("a:b.mp4") and numbered sequences ("%03d.png").
  file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
  with file, _as_decode_error("video"), av.open(file) as container:
    stream = container.streams.best("video")
    if stream is None:
      raise DecodeError("the file has no video")
    context = stream.codec_context
    size = f"{context.width}x{context.height} pixels"
    check_affordable(context.width * context.height * _VIDEO_BYTES, f"a frame of {size}")
    # Clips are read by many threads at once: more inside each would get into their way.
    context.thread_count = 1
    yield container, stream


def check_frames(count: int, height: int, width: int, channels: int, working: int = _DECODER_BYTES) -> None:
  """Raises a `DecodeError` when the frames that are wanted of a clip take more memory than one record may."""
  check_affordable(height * width * (count * channels + working), f"{count} frames of {width}x{height} pixels")


@contextlib.contextmanager
def _as_decode_error(what: str) -> Iterator[None]:
  """Turns whatever a decoder raises into `DecodeError`, and leaves errors of the file system as they are."""
  try:
    yield
  except (DecodeError, UserError):
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _PASSING:
      raise
    raise undecodable(error, what) from error
