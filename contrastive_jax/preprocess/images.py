"""Files, bytes, PIL images and arrays to uint8 pixels, and pixels to patches."""

import functools
import io
import os
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image, ImageOps

from contrastive_jax.batch import ImageBatch

Pixels = UInt8[np.ndarray, "height width channels"]
WHITE = (255, 255, 255)


class DecodeError(ValueError):
  """The record itself is bad, and reading it again would not help. I/O errors are left as they are."""


def decode(source: Any, background: tuple[int, int, int] | None = WHITE) -> Pixels:
  """Reads a picture, upright and in 8-bit RGB.

  EXIF orientation is applied; palettes, CMYK, greyscale and 16-bit pictures are converted.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array `[height, width]` or `[height, width, 1|3|4]` of
      uint8 or uint16.
    background: colour put behind transparent pixels. None keeps transparency.

  Returns:
    uint8 `[height, width, 3]`; with `background=None` a transparent picture comes as `[height, width, 4]`, its colour
    multiplied by alpha (what warps and blends correctly).

  Raises:
    DecodeError: if this is no picture that can be read.
    OSError: if the path cannot be read.
  """
  if isinstance(source, np.ndarray):
    pixels = _from_array(source)
  elif isinstance(source, Image.Image):
    pixels = _from_pil(source)
  else:
    pixels = _from_bytes(source if isinstance(source, bytes) else _read(source))
  if pixels.shape[2] == 3:
    return pixels
  pixels = premultiply(pixels)
  return pixels if background is None else composite(pixels, background)


def premultiply(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 4"]:
  """Multiplies colour by alpha, rounding to nearest."""
  scaled = (pixels[..., :3].astype(np.uint16) * pixels[..., 3:] + 127) // 255
  return np.dstack([scaled.astype(np.uint8), pixels[..., 3]])


def composite(
  pixels: UInt8[np.ndarray, "height width 4"], background: tuple[int, int, int] = WHITE
) -> UInt8[np.ndarray, "height width 3"]:
  """Puts premultiplied pixels on a plain background."""
  behind = (np.asarray(background, np.uint16) * (255 - pixels[..., 3:]).astype(np.uint16) + 127) // 255
  return (pixels[..., :3] + behind).astype(np.uint8)


def trim(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "rows columns 4"]:
  """Cuts a drawing to the box around what it shows, centred in a square: every artist leaves other margins."""
  left, top, width, height = cv2.boundingRect((pixels[..., 3] > 8).astype(np.uint8))
  if not width:
    return pixels
  side = max(width, height)
  square = np.zeros((side, side, 4), np.uint8)
  down, across = (side - height) // 2, (side - width) // 2
  square[down : down + height, across : across + width] = pixels[top : top + height, left : left + width]
  return square


def resize(
  image: UInt8[np.ndarray, "h w 3"], height: int, width: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "{height} {width} 3"]:
  """Resizes, "bicubic" or "bilinear", antialiased as in PIL, which the published CLIP and SigLIP preprocessing uses."""
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()]))


def center_crop(
  image: UInt8[np.ndarray, "h w 3"], size: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Resizes the shorter side to `size` and cuts the middle square (CLIP's preprocessing)."""
  height, width = image.shape[:2]
  short = min(height, width)
  # Rounded down, as torchvision does.
  height, width = size * height // short, size * width // short
  top, left = (height - size) // 2, (width - size) // 2
  return np.ascontiguousarray(resize(image, height, width, interpolation)[top : top + size, left : left + size])


def patchify(images: UInt8[np.ndarray, "rows height width channels"], patch_size: int) -> ImageBatch:
  """Cuts images into a row-major sequence of patches, each laid out as (y, x, channel).

  Args:
    images: equally large images.
    patch_size: side of a patch in pixels; divides both sides of the images.

  Returns:
    Patches `[rows, length, patch_size**2 * channels]` and their `(0, y, x)` coordinates; no segments, no slots.

  Raises:
    ValueError: if the patches do not tile the image.
  """
  patches, coords = cut(images[:, None], patch_size, 1)
  return ImageBatch(patches, np.repeat(coords[None], len(images), axis=0))


def unpatchify(image: ImageBatch, patch_size: int, channels: int = 3) -> UInt8[np.ndarray, "rows h w channels"]:
  """Puts the patches of a fixed-resolution batch back together: the inverse of `patchify`."""
  return join(np.asarray(image.patches), np.asarray(image.coords)[0], patch_size, channels)[:, 0]


def cut(
  clips: UInt8[np.ndarray, "rows frames height width channels"], patch_size: int, tubelet: int
) -> tuple[UInt8[np.ndarray, "rows length patch_dim"], Int16[np.ndarray, "length 3"]]:
  """Cuts clips into tubelets in the order of (t, y, x), each laid out as (frame, y, x, channel).

  Args:
    clips: equally large clips; an image is a clip of one frame.
    patch_size: side of a tubelet in pixels; divides both sides of the frames.
    tubelet: frames of a tubelet; divides those of the clips.

  Returns:
    The tubelets, and the (t, y, x) that all clips share.

  Raises:
    ValueError: if the tubelets do not tile the clips.
  """
  rows, frames, height, width, channels = clips.shape
  if height % patch_size or width % patch_size:
    raise ValueError(f"patches of {patch_size} pixels do not tile images of {height}x{width}")
  if frames % tubelet:
    raise ValueError(f"tubelets of {tubelet} frames do not tile clips of {frames}")
  t, y, x = frames // tubelet, height // patch_size, width // patch_size
  tiles = clips.reshape(rows, t, tubelet, y, patch_size, x, patch_size * channels).transpose(0, 1, 3, 5, 2, 4, 6)
  patches = np.ascontiguousarray(tiles).reshape(rows, t * y * x, tubelet * patch_size * patch_size * channels)
  return patches, _grid(t, y, x)


def join(
  patches: UInt8[np.ndarray, "rows length patch_dim"],
  coords: Int16[np.ndarray, "length 3"],
  patch_size: int,
  channels: int = 3,
) -> UInt8[np.ndarray, "rows frames height width {channels}"]:
  """Puts tubelets back together: the inverse of `cut`."""
  rows, _, patch_dim = patches.shape
  t, y, x = (coords.max(axis=0) + 1).tolist()
  tubelet = patch_dim // (patch_size * patch_size * channels)
  tiles = patches.reshape(rows, t, y, x, tubelet, patch_size, patch_size * channels).transpose(0, 1, 4, 2, 5, 3, 6)
  return np.ascontiguousarray(tiles).reshape(rows, t * tubelet, y * patch_size, x * patch_size, channels)


@functools.cache
def _grid(t: int, y: int, x: int) -> np.ndarray:
  coords = np.ascontiguousarray(np.indices((t, y, x), dtype=np.int16).reshape(3, t * y * x).T)
  coords.setflags(write=False)
  return coords


def _read(path: str | os.PathLike) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def _from_array(array: np.ndarray) -> np.ndarray:
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
    raise DecodeError(f"an image array is [height, width] or [height, width, 1|3|4], got {list(array.shape)}")
  if array.dtype == np.uint16:
    array = _eight_bits(array)
  if array.dtype != np.uint8:
    raise DecodeError(f"an image array is uint8 or uint16, got {array.dtype}")
  return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _from_bytes(data: bytes) -> np.ndarray:
  # OpenCV decodes JPEG several times faster than PIL, but fills what a truncated file lacks with grey, so that only
  # files with their end marker take this path; it has its own idea of CMYK, so these do not take it either.
  if data[:2] == b"\xff\xd8" and b"\xff\xd9" in data[-64:] and b"Adobe" not in data[:4096]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is not None:
      return pixels
  try:
    with Image.open(io.BytesIO(data)) as image:
      return _from_pil(image)
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise DecodeError(f"not a picture that can be decoded ({error})") from error


def _from_pil(image: Image.Image) -> np.ndarray:
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):
    return np.repeat(_eight_bits(np.asarray(image).clip(0, 65535))[..., None], 3, axis=2)
  transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
  return np.asarray(image.convert("RGBA" if transparent else "RGB"))


def _eight_bits(values: np.ndarray) -> np.ndarray:
  """16-bit samples to the nearest of 256 levels (65535 is 255)."""
  return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
