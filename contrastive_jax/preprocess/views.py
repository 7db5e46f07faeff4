"""Views of images and clips for a trained model: nothing random, at the sizes that it was trained for, as patches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import images, native
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.video import Clip, choose_frames

# Patches and their coordinates. Anonymous sizes: those of images and clips in one list differ.
Patches = tuple[UInt8[np.ndarray, "_ _"], Int[np.ndarray, "_ 3"]]


@dataclasses.dataclass(frozen=True)
class Views:
  """Turns images and clips into patches.

  Attributes:
    patch_size: side of a patch in pixels.
    tubelet: number of frames of a patch of a clip.
    resolution: the resolution of images. "fixed" resizes the shorter side and cuts out the middle square; an image with
      transparency, a drawing, is shown whole, on white. "naflex" fills the longest of its lengths.
    clips: the resolution of clips; `max_tokens` bounds a whole clip. At "fixed" it makes the squares smaller where
      needed.
    frames: number of frames of a clip that are looked at, from all over its length.
    resize: "crop" cuts out the middle of photographs; "squash" makes squares of them by ignoring their aspect.
    interpolation: "bicubic" or "bilinear".

  Raises:
    UserError: if the tubelets do not divide the frames.
  """

  patch_size: int
  tubelet: int
  resolution: Resolution
  clips: Resolution
  frames: int = 8
  resize: str = "crop"
  interpolation: str = "bicubic"

  def __post_init__(self):
    if self.frames < 1 or self.frames % self.tubelet:
      raise UserError(f"frames={self.frames} must be a multiple of model.image.tubelet={self.tubelet}")

  def __call__(self, item: Any) -> Patches:
    """Returns the patches and (t, y, x) coordinates of an image, a clip, or frames in one array.

    An image is anything that `images.decode` reads.
    """
    if isinstance(item, Clip) or getattr(item, "ndim", 0) == 4:
      return native.patchify_clip(self._clip(item), self.patch_size, self.tubelet)
    # No name here holds the pixels, so that they are gone once they are on white.
    sized = self._sized(images.straight(item), self.resolution, times=1, blend=images.flatten)
    return native.patchify_clip(sized[None], self.patch_size, 1)

  def lengths(self) -> tuple[int, ...]:
    """Returns the row lengths that batches come in, ascending; they are few, since each is compiled."""
    times = self.frames // self.tubelet
    return tuple(sorted({*_ladder(self.resolution, self.patch_size, 1), *_ladder(self.clips, self.patch_size, times)}))

  @property
  def uniform(self) -> bool:
    """Whether all images have as many patches."""
    return self.resolution.mode == "fixed"

  def _clip(self, item: Any) -> UInt8[np.ndarray, "frames height width 3"]:
    if isinstance(item, Clip):
      frames = item.read(choose_frames(item.count, item.fps, self.frames, "uniform"))
    else:
      chosen = choose_frames(len(item), 1.0, self.frames, "uniform")
      frames = np.stack([images.decode(item[index], background=None) for index in chosen.tolist()])
    times = self.frames // self.tubelet
    return np.stack([self._sized(frame, self.clips, times, blend=images.composite) for frame in frames])

  def _sized(
    self, pixels: np.ndarray, resolution: Resolution, times: int, *, blend: Callable[[np.ndarray], np.ndarray]
  ) -> UInt8[np.ndarray, "height width 3"]:
    """Brings a picture, or a frame of a clip of `times` tubelets, to its size; `blend` puts it on white."""
    drawing = pixels.shape[2] == 4 and pixels[..., 3].min() < 255
    pixels = blend(pixels) if pixels.shape[2] == 4 else pixels
    patch = self.patch_size
    if resolution.mode == "fixed":
      size = _square(resolution, patch, times)
      # A patch embedding leaves out the pixels that do not fill a patch, such as 6 of the 384 at patch size 14.
      seen = size // patch * patch
      pixels = squared(pixels) if drawing else pixels
      if self.resize == "squash":
        return images.resize(pixels, size, size, self.interpolation)[:seen, :seen]
      return images.center_crop(pixels, size, self.interpolation)[:seen, :seen]
    height, width = pixels.shape[:2]
    if resolution.mode == "native":
      limits = resolution.limits(times)
      if not limits["max_tokens"]:
        raise UserError(f"max_tokens={resolution.max_tokens} is too few for clips of {self.frames} frames: raise it")
      return images.resize(pixels, *native.fit(height, width, patch=patch, **limits), self.interpolation)
    length = max(resolution.lengths) // times
    shape = native.fit_to_length(height, width, patch=patch, length=length)
    return images.resize(pixels, *shape, self.interpolation)


def gather(items: list[Patches], length: int, *, width: int, padded: bool) -> ImageBatch:
  """Puts each image or clip into a row of its own.

  Args:
    items: the patches and coordinates of images, clips, or both; an image equals a clip of it repeated.
    length: length of the rows, at least that of the longest item.
    width: number of bytes of a patch, those of a clip's where there is one.
    padded: whether segments mark the padding; without it all items are `length` long.

  Examples:
    >>> one = np.ones((1, 12), np.uint8), np.zeros((1, 3), np.int16)
    >>> two = np.ones((2, 12), np.uint8), np.zeros((2, 3), np.int16)
    >>> gather([one, two], 2, width=12, padded=True).patches[..., 0].tolist()
    [[1, 0], [1, 1]]
  """
  rows = len(items)
  batch = ImageBatch(
    np.zeros((rows, length, width), np.uint8),
    np.zeros((rows, length, 3), np.int16),
    np.zeros((rows, length), np.int16) if padded else None,
  )
  for row, (patches, coords) in enumerate(items):
    batch.patches[row, : len(patches)] = np.tile(patches, (1, width // patches.shape[1]))
    batch.coords[row, : len(patches)] = coords
    if padded:
      batch.segment_ids[row, : len(patches)] = 1
  return batch


def _square(resolution: Resolution, patch: int, times: int) -> int:
  """Returns the side in pixels at "fixed": as given, or as large as the tokens of a whole clip allow."""
  size = resolution.size
  if times == 1 or not resolution.max_tokens or (size // patch) ** 2 * times <= resolution.max_tokens:
    return size
  return max(1, int((resolution.max_tokens // times) ** 0.5)) * patch


def squared(pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "side side 3"]:
  """Puts a picture into the middle of a white square.

  Examples:
    >>> squared(np.zeros((1, 3, 3), np.uint8))[..., 0].tolist()
    [[255, 255, 255], [0, 0, 0], [255, 255, 255]]
  """
  return images.in_square(pixels, 255)


def _ladder(resolution: Resolution, patch: int, times: int) -> tuple[int, ...]:
  """Returns row lengths for a resolution, of which one is at most half as long again as an image needs."""
  if resolution.mode == "fixed":
    return ((_square(resolution, patch, times) // patch) ** 2 * times,)
  if resolution.mode == "naflex":
    return (max(resolution.lengths),)
  steps = {unit << power for unit in (2, 3) for power in range(resolution.max_tokens.bit_length())}
  between = {step for step in steps if resolution.min_tokens <= step < resolution.max_tokens}
  return (*sorted(between), resolution.max_tokens)
