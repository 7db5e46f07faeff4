"""Clips that TFDS stores as one picture a frame."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from contrastive_jax.preprocess.video import Frames, check_frames


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFrames:
  """A clip whose frames are files in memory, decoded when asked for.

  Attributes:
    files: the bytes of one JPEG or PNG for each frame, at least one.
    fps: number of frames a second. TFDS does not say; UCF101's clips all have 25.
  """

  files: Sequence[bytes]
  fps: float = 25.0

  @property
  def count(self) -> int:
    return len(self.files)

  @property
  def height(self) -> int:
    return self._first.shape[0]

  @property
  def width(self) -> int:
    return self._first.shape[1]

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> Frames:
    """Returns the frames, RGB. Raises DecodeError if one is bad."""
    indices = np.asarray(indices, int)
    check_frames(len(indices), self.height, self.width, 3)
    frames = np.empty((len(indices), self.height, self.width, 3), np.uint8)
    for k, index in enumerate(indices.tolist()):
      frame = decode(self.files[index])
      if frame.shape != frames.shape[1:]:
        raise DecodeError(
          f"frame {index} is {frame.shape[1]}x{frame.shape[0]} pixels, the first {self.width}x{self.height}"
        )
      frames[k] = frame
    return frames

  @functools.cached_property
  def _first(self) -> np.ndarray:
    return decode(self.files[0])


@functools.cache
def read_videos_as_frames() -> None:
  """Lets TFDS open sets with a Video feature without TensorFlow, which its class asks for to name a type of number.

  The records hold a sequence of pictures, which takes the place of the feature by TFDS's own mechanism for classes that
  have moved.
  """
  import tensorflow_datasets as tfds

  class Moved(tfds.features.Sequence):
    ALIASES = (f"{tfds.features.Video.__module__}.Video",)

    @classmethod
    def from_json_content(cls, value) -> tfds.features.Sequence:
      shape = [side if side > 0 else None for side in value.shape.dimensions[1:]]
      image = tfds.features.Image(shape=shape or None, encoding_format=value.encoding_format or None)
      return tfds.features.Sequence(image)
