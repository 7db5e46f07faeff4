"""Native resolution: the grid of patches for an image's own size and shape, and clips as tubelets."""

import bisect
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int16, UInt8

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import cut


def fit(height: int, width: int, *, patch: int, min_tokens: int = 1, max_tokens: int) -> tuple[int, int]:
  """Finds the size to resize an image to: whole patches within the limits, as near as possible to the image's own size.

  The image's size in patches, scaled to the nearer limit where its area is outside of both, is rounded to the grid that
  is nearest in the logarithms of both sides: enlarging and reducing by the same factor, and stretching either side,
  count alike. A grid that is within the limits is its own nearest, so that fitting twice changes nothing.

  Args:
    height: height of the image in pixels.
    width: width of the image in pixels.
    patch: side of a patch in pixels.
    min_tokens: the fewest patches, to which small images are enlarged.
    max_tokens: the most patches, to which large images are reduced.

  Returns:
    (height, width) in pixels. An image thinner than a patch becomes one patch thick, a strip too long for
    `max_tokens` one patch thick and `max_tokens` long.

  Raises:
    UserError: if the limits are no range from 1 on.

  Serves as UniViTAR's `smart_resize`, with limits in patches and both sides rounded together.

  Examples:
    >>> fit(100, 200, patch=16, max_tokens=256), fit(1000, 2000, patch=16, max_tokens=256)
    ((96, 208), (176, 368))
  """
  _require_size(height, width)
  if not 1 <= min_tokens <= max_tokens:
    raise UserError(f"min_tokens={min_tokens} and max_tokens={max_tokens} must be a range from 1 on")
  down, across = height / patch, width / patch
  area = down * across
  scale = math.sqrt(min(max(area, min_tokens), max_tokens) / area) if not min_tokens <= area <= max_tokens else 1.0
  rows, columns = _nearest_grid(down * scale, across * scale, min_tokens, max_tokens)
  return rows * patch, columns * patch


def fit_to_length(height: int, width: int, *, patch: int, length: int) -> tuple[int, int]:
  """Finds the largest size of the image's shape that fits into `length` patches, sides rounded up to whole patches.

  Args:
    height: height of the image in pixels.
    width: width of the image in pixels.
    patch: side of a patch in pixels.
    length: the most patches; a strip too long for it becomes one patch thick and `length` long.

  Returns:
    (height, width) in pixels, enlarged or reduced alike.

  Raises:
    UserError: if no patch fits.

  Follows NaFlex (SigLIP 2), which bisects a real ratio; here the bisection is over the whole numbers of patches at
  which a side is filled exactly, so that the answer is exact.

  Examples:
    >>> fit_to_length(100, 200, patch=16, length=256)
    (176, 352)
  """
  _require_size(height, width)
  if length < 1:
    raise UserError(f"the sequence length is {length}, it must be at least 1 patch")
  long, short = max(height, width), min(height, width)

  def other(side: int, mine: int, theirs: int) -> int:
    return -(-side * theirs // mine)

  # As the image grows, a side fills its last patch at each whole number; the largest that fits is filled one way.
  by_long = bisect.bisect_right(range(1, length + 1), length, key=lambda n: n * other(n, long, short))
  by_short = bisect.bisect_right(range(1, length + 1), length, key=lambda n: n * other(n, short, long))
  filled = by_long, other(by_long, long, short)
  if by_short * long > by_long * short:
    filled = other(by_short, short, long), by_short
  rows, columns = filled if height >= width else filled[::-1]
  return rows * patch, columns * patch


def patchify_clip(
  frames: UInt8[np.ndarray, "frames height width channels"], patch: int, tubelet: int
) -> tuple[UInt8[np.ndarray, "tokens patch_dim"], Int16[np.ndarray, "tokens 3"]]:
  """Cuts a clip into tubelets of `tubelet` frames and `patch` x `patch` pixels; an image is one frame and tubelet 1.

  Returns:
    Tubelets in the order of (t, y, x), each laid out as (frame, y, x, channel), and their coordinates.

  Raises:
    ValueError: if the tubelets do not tile the clip.

  Examples:
    >>> patches, coords = patchify_clip(np.zeros((2, 4, 4, 3), np.uint8), 4, 2)
    >>> patches.shape, coords.tolist()
    ((1, 96), [[0, 0, 0]])
  """
  patches, coords = cut(frames[None], patch, tubelet)
  return patches[0], coords


def _nearest_grid(rows: float, columns: float, fewest: int, most: int) -> tuple[int, int]:
  """Finds the whole (rows, columns) with a product in [fewest, most] that are nearest in logarithms."""
  best, found = math.inf, (1, most)
  for walk in (range(min(int(rows), most), 0, -1), range(min(int(rows), most) + 1, most + 1)):
    for y in walk:
      away = math.log(y / rows) ** 2
      if away >= best:
        break  # Farther rows are farther still, whatever the columns.
      for x in _around(columns, -(-fewest // y), most // y):
        distance = away + math.log(x / columns) ** 2
        if distance < best:
          best, found = distance, (y, x)
  return found


def _around(value: float, lowest: int, highest: int) -> Iterator[int]:
  """Yields the whole numbers of [lowest, highest] on either side of a value."""
  if lowest <= highest:
    below = min(max(int(value), lowest), highest)
    yield below
    if below == int(value) < highest:
      yield below + 1


def _require_size(height: int, width: int) -> None:
  if height < 1 or width < 1:
    raise UserError(f"an image is {height}x{width} pixels, both sides must be at least 1")
