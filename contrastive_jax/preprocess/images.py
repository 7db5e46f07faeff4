"""Images: from files, bytes, PIL images and arrays to uint8 pixels, and from pixels to patches."""

import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from contrastive_jax.batch import ImageBatch
from contrastive_jax.preprocess import decoding
from contrastive_jax.preprocess.decoding import DecodeError

Pixels = UInt8[np.ndarray, "height width channels"]
WHITE = (255, 255, 255)


# Pixels that resizing may hold at once between its two directions, and the side of what stands in a square.
_MOST_BETWEEN, _MOST_SIDE = 1 << 24, 1 << 12


def decode(source: Any, background: tuple[int, int, int] | None = WHITE) -> Pixels:
  """Reads a picture, upright and in 8-bit RGB.

  EXIF orientation is applied where it can be read, whatever else the metadata hold; palettes, CMYK, greyscale and
  16-bit pictures are converted. Of several pages or frames the first is read.

  Args:
    source: a path, the bytes of a file, a PIL image, or an array `[height, width]` or `[height, width, 1|3|4]` of
      uint8 or uint16.
    background: the colour put behind transparent pixels. None keeps transparency.

  Returns:
    uint8 `[height, width, 3]`; with `background=None` a transparent picture comes as `[height, width, 4]`, its colour
    multiplied by alpha (what warps and blends correctly).

  Raises:
    DecodeError: if this is no picture that can be read, or takes more memory than `decoding.MAX_BYTES`.
    OSError: if the path cannot be read.
  """
  pixels = straight(source)
  if pixels.shape[2] == 3:
    return pixels
  return premultiply(pixels) if background is None else flatten(pixels, background)


def straight(source: Any) -> Pixels:
  """Reads a picture as `decode` does, but with its colour not multiplied by alpha, so that `decode` takes the result.

  Args:
    source: a path, the bytes of a file, a PIL image or an array, as for `decode`.

  Returns:
    uint8 `[height, width, 3]`, or `[height, width, 4]` where there is transparency.

  Raises:
    DecodeError: if this is no picture that can be read, or takes more memory than `decoding.MAX_BYTES`.
    OSError: if the path cannot be read.
  """
  if isinstance(source, np.ndarray):
    return _from_array(source)
  if isinstance(source, Image.Image):
    try:
      return decoding.from_pil(source)
    except DecodeError:
      raise
    except Exception as error:
      if getattr(error, "errno", None) is not None:
        raise  # The file behind a lazy image could not be read.
      raise decoding.undecodable(error) from error
  return decoding.from_bytes(source if isinstance(source, bytes) else decoding.read_file(source))


def premultiply(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 4"]:
  """Multiplies colour by alpha, rounding to nearest.

  Examples:
    >>> premultiply(np.uint8([[[255, 100, 0, 128]]])).tolist()
    [[[128, 50, 0, 128]]]
  """
  scaled = np.empty(pixels.shape, np.uint8)
  for rows in _strips(pixels):
    scaled[rows, :, :3] = (pixels[rows, :, :3].astype(np.uint16) * pixels[rows, :, 3:] + 127) // 255
  scaled[..., 3] = pixels[..., 3]
  return scaled


def undo_premultiply(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 4"]:
  """Divides colour by alpha, which undoes `premultiply` as far as its rounding allows.

  Examples:
    >>> undo_premultiply(np.uint8([[[128, 50, 0, 128]]])).tolist()
    [[[255, 100, 0, 128]]]
  """
  straight = np.empty(pixels.shape, np.uint8)
  for rows in _strips(pixels):
    colour, alpha = pixels[rows, :, :3].astype(np.uint16), pixels[rows, :, 3:].astype(np.uint16)
    straight[rows, :, :3] = np.minimum((colour * 255 + alpha // 2) // np.maximum(alpha, 1), 255)
  straight[..., 3] = pixels[..., 3]
  return straight


def composite(
  pixels: UInt8[np.ndarray, "height width 4"], background: tuple[int, int, int] = WHITE
) -> UInt8[np.ndarray, "height width 3"]:
  """Puts premultiplied pixels on a plain background.

  Examples:
    >>> composite(np.uint8([[[128, 50, 0, 128]]])).tolist()
    [[[255, 177, 127]]]
  """
  colour = np.asarray(background, np.uint16)
  plain = np.empty((*pixels.shape[:2], 3), np.uint8)
  for rows in _strips(pixels):
    behind = (colour * (255 - pixels[rows, :, 3:]).astype(np.uint16) + 127) // 255
    plain[rows] = pixels[rows, :, :3] + behind
  return plain


def flatten(
  pixels: UInt8[np.ndarray, "height width 4"], background: tuple[int, int, int] = WHITE
) -> UInt8[np.ndarray, "height width 3"]:
  """Puts pixels whose colour is not multiplied by alpha on a plain background, without a whole multiplied copy."""
  plain = np.empty((*pixels.shape[:2], 3), np.uint8)
  for rows in _strips(pixels):
    plain[rows] = composite(premultiply(pixels[rows]), background)
  return plain


def _strips(pixels: np.ndarray) -> list[slice]:
  """Cuts a picture into the rows that are worked on at once, so that wider numbers never exist for all of it."""
  rows = max(1, (1 << 18) // max(1, pixels.shape[1]))
  return [slice(start, start + rows) for start in range(0, pixels.shape[0], rows)]


def trim(pixels: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "rows columns 4"]:
  """Cuts a drawing to the box around its visible pixels, centred in a square: every artist leaves other margins."""
  left, top, width, height = cv2.boundingRect((pixels[..., 3] > 8).astype(np.uint8))
  if not width:
    return pixels
  return in_square(pixels[top : top + height, left : left + width], 0)


def in_square(
  pixels: UInt8[np.ndarray, "height width channels"], level: int
) -> UInt8[np.ndarray, "side side channels"]:
  """Puts a picture into the middle of a square of one level; a square that would be huge is made smaller with it."""
  height, width, channels = pixels.shape
  side = max(height, width)
  if height == width:
    return pixels
  if side > _MOST_SIDE:
    height, width = (max(1, round(length * _MOST_SIDE / side)) for length in (height, width))
    pixels, side = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), max(height, width)
  square = np.full((side, side, channels), level, np.uint8)
  down, across = (side - height) // 2, (side - width) // 2
  square[down : down + height, across : across + width] = pixels
  return square


def resize(
  image: UInt8[np.ndarray, "h w 3"], height: int, width: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "{height} {width} 3"]:
  """Resizes an image, antialiased as in PIL, which the published CLIP and SigLIP preprocessing uses.

  Args:
    image: the pixels.
    height: the new height.
    width: the new width.
    interpolation: "bicubic" or "bilinear".

  Examples:
    >>> resize(np.full((4, 6, 3), 7, np.uint8), 2, 3).shape
    (2, 3, 3)
  """
  if image.shape[:2] == (height, width):
    return image
  method = Image.Resampling[interpolation.upper()]
  if image.shape[0] * width > _MOST_BETWEEN and image.shape[1] * height < image.shape[0] * width:
    # PIL resizes along x first, which makes a tall strip huge for a moment: along y first it is small.
    turned = Image.fromarray(np.ascontiguousarray(image.swapaxes(0, 1))).resize((height, width), method)
    return np.ascontiguousarray(np.asarray(turned).swapaxes(0, 1))
  return np.asarray(Image.fromarray(image).resize((width, height), method))


def center_crop(
  image: UInt8[np.ndarray, "h w 3"], size: int, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "{size} {size} 3"]:
  """Resizes the shorter side to `size` and cuts out the middle square, as CLIP's preprocessing does.

  Examples:
    >>> center_crop(np.zeros((4, 8, 3), np.uint8), 2).shape
    (2, 2, 3)
  """
  height, width = image.shape[:2]
  short = min(height, width)
  if size * size * max(height, width) // short > _MOST_BETWEEN:
    return _center_of_strip(image, size, interpolation)
  # Rounded down, as torchvision does.
  height, width = size * height // short, size * width // short
  top, left = (height - size) // 2, (width - size) // 2
  return np.ascontiguousarray(resize(image, height, width, interpolation)[top : top + size, left : left + size])


def _center_of_strip(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
  """Does what `center_crop` does, for a picture so thin that it would be huge with its shorter side resized."""
  height, width = image.shape[:2]
  short = min(height, width)
  # The kernel of "bicubic" reaches two pixels to each side, more where it reduces.
  reach = short // 2 + 2 * max(1, -(-short // size)) + 2
  middle = (height / 2, width / 2)
  top, left = (max(0, int(at) - reach) for at in middle)
  near = image[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
  box = (middle[1] - short / 2 - left, middle[0] - short / 2 - top)
  box = (*box, box[0] + short, box[1] + short)
  resized = Image.fromarray(np.ascontiguousarray(near)).resize(
    (size, size), Image.Resampling[interpolation.upper()], box=box
  )
  return np.asarray(resized)


def patchify(
  images: UInt8[np.ndarray, "rows height width channels"] | Sequence[UInt8[np.ndarray, "height width channels"]],
  patch_size: int,
) -> ImageBatch:
  """Cuts images into a row-major sequence of patches, each laid out as (y, x, channel).

  Args:
    images: images of equal size, in one array or in a list of at least one.
    patch_size: side of a patch in pixels, which divides both sides of the images.

  Returns:
    Patches `[rows, length, patch_size**2 * channels]` and their `(0, y, x)` coordinates, not packed.

  Raises:
    ValueError: if the patches do not tile the image.

  Examples:
    >>> batch = patchify(np.zeros((1, 4, 6, 3), np.uint8), 2)
    >>> batch.patches.shape, batch.coords[0, :4].tolist()
    ((1, 6, 12), [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]])
  """
  if isinstance(images, np.ndarray):
    patches, coords = cut(images[:, None], patch_size, 1)
  else:
    # One at a time, while the cache of the processor still holds it: a stack of them would be one more copy.
    first, coords = cut(images[0][None, None], patch_size, 1)
    patches = np.empty((len(images), *first.shape[1:]), np.uint8)
    for image, row in zip(images, patches, strict=True):
      cut(image[None, None], patch_size, 1, out=row[None])
  return ImageBatch(patches, np.repeat(coords[None], len(images), axis=0))


def unpatchify(image: ImageBatch, patch_size: int, channels: int = 3) -> UInt8[np.ndarray, "rows h w channels"]:
  """Puts the patches of a fixed-resolution batch back together, which undoes `patchify`."""
  return join(np.asarray(image.patches), np.asarray(image.coords)[0], patch_size, channels)[:, 0]


def cut(
  clips: UInt8[np.ndarray, "rows frames height width channels"],
  patch_size: int,
  tubelet: int,
  out: UInt8[np.ndarray, "rows length patch_dim"] | None = None,
) -> tuple[UInt8[np.ndarray, "rows length patch_dim"], Int16[np.ndarray, "length 3"]]:
  """Cuts clips into tubelets in the order of (t, y, x), each laid out as (frame, y, x, channel).

  Args:
    clips: clips of equal size; an image is a clip of one frame.
    patch_size: side of a tubelet in pixels, which divides both sides of the frames.
    tubelet: number of frames of a tubelet, which divides that of the clips.
    out: a contiguous array that takes the tubelets; None makes one.

  Returns:
    The tubelets, and the (t, y, x) coordinates that all clips share.

  Raises:
    ValueError: if the tubelets do not tile the clips.

  Examples:
    >>> patches, coords = cut(np.zeros((1, 4, 2, 2, 3), np.uint8), 2, 2)
    >>> patches.shape, coords.tolist()
    ((1, 2, 24), [[0, 0, 0], [1, 0, 0]])
  """
  rows, frames, height, width, channels = clips.shape
  if height % patch_size or width % patch_size:
    raise ValueError(f"patches of {patch_size} pixels do not tile images of {height}x{width}")
  if frames % tubelet:
    raise ValueError(f"tubelets of {tubelet} frames do not tile clips of {frames}")
  t, y, x = frames // tubelet, height // patch_size, width // patch_size
  # A line of a patch is copied as one item, three times as fast as byte by byte.
  lines = np.ascontiguousarray(clips).reshape(rows, t, tubelet, y, patch_size, x, patch_size * channels)
  tiles = lines.view(f"V{patch_size * channels}")[..., 0].transpose(0, 1, 3, 5, 2, 4)
  shape = rows, t * y * x, tubelet * patch_size * patch_size * channels
  patches = np.empty(shape, np.uint8) if out is None else out.reshape(shape, copy=False)
  patches.view(tiles.dtype).reshape(tiles.shape, copy=False)[...] = tiles
  return patches, _grid(t, y, x)


def join(
  patches: UInt8[np.ndarray, "rows length patch_dim"],
  coords: Int16[np.ndarray, "length 3"],
  patch_size: int,
  channels: int = 3,
) -> UInt8[np.ndarray, "rows frames height width {channels}"]:
  """Puts tubelets back together, which undoes `cut`."""
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


def _from_array(array: np.ndarray) -> np.ndarray:
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
    raise DecodeError(f"an image array is [height, width] or [height, width, 1|3|4], got {list(array.shape)}")
  if array.dtype == np.uint16:
    array = decoding.eight_bits(array)
  if array.dtype != np.uint8:
    raise DecodeError(f"an image array is uint8 or uint16, got {array.dtype}")
  return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
