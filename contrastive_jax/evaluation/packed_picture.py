"""Draws a packed batch: the images of each row stand above the tokens that they become, and padding is hatched."""

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from contrastive_jax.batch import ImageBatch
from contrastive_jax.preprocess.images import join

_PAGE, _INK, _SOFT, _HATCH = (255, 255, 255), (28, 33, 38), (104, 112, 120), (203, 206, 203)
# Neighbours in a row differ clearly, in lightness too.
_TINTS = ((34, 87, 126), (190, 118, 40), (61, 125, 107), (116, 92, 170), (176, 66, 48), (120, 138, 52))

# A place in pixels of the picture at scale 1.
_Place = int | float

_MARGIN, _LABEL, _GUTTER, _BAND, _ROW_GAP, _PAD = 26, 11, 44, 12, 24, 5
# A token is as wide as the images need to stand above their own tokens, within reason.
_NARROWEST, _WIDEST = 2.0, 4.0


@dataclasses.dataclass(frozen=True)
class _Segment:
  """One image or clip of a row: its pair, its first token, its patches along (t, y, x), its frames side by side."""

  pair: int
  start: int
  grid: tuple[int, int, int]
  pixels: np.ndarray
  means: np.ndarray

  @property
  def size(self) -> int:
    """The number of its tokens."""
    t, y, x = self.grid
    return t * y * x


def draw(
  image: ImageBatch, *, patch_size: int, rows: int = 8, scale: int = 2, credit: str = ""
) -> UInt8[np.ndarray, "height width 3"]:
  """Draws the rows of a packed batch.

  Every image stands, at its own resolution, over the stretch of tokens that it takes. The tokens lie below it in the
  order in which the tower reads them, each in the mean colour of its patch. For a clip, the first frame of each tubelet
  is shown. A label gives the number of the pair and the columns and rows of patches.

  Args:
    image: a packed batch of RGB patches, on the host.
    patch_size: side of a patch in pixels.
    rows: the most rows that are drawn, from the first on.
    scale: number of pixels of the picture for a pixel of an image.
    credit: the authors of the images, written below.
  """
  packed = [_segments(image, row, patch_size) for row in range(min(rows, len(image.patches)))]
  length = image.patches.shape[1]
  needed = [(s.pixels.shape[1] + 2 * _PAD) / s.size for row in packed for s in row]
  token = float(np.clip(max(needed, default=_NARROWEST), _NARROWEST, _WIDEST))
  heights = [max((s.pixels.shape[0] for s in row), default=_BAND) for row in packed]
  tall = sum(heights) + len(packed) * (_LABEL + 3 * _PAD + _BAND + _ROW_GAP) - _ROW_GAP
  header, footer = 30, 34
  width, height = round(_GUTTER + token * length) + 2 * _MARGIN, tall + header + footer + 2 * _MARGIN
  canvas = _Canvas(Image.new("RGB", (width * scale, height * scale), _PAGE), scale)

  real = np.count_nonzero(image.segment_ids) / image.segment_ids.size
  count = int(sum(row.max() for row in np.asarray(image.segment_ids)))
  title = f"{count} images in {len(image.patches)} rows of {length} tokens: {real:.1%} of the tokens are real"
  canvas.text(_MARGIN, _MARGIN, title, 15, _INK)
  top = _MARGIN + header
  for number, (row, tallest) in enumerate(zip(packed, heights, strict=True)):
    _draw_row(canvas, row, number, top, tallest, token, length)
    top += tallest + _LABEL + 3 * _PAD + _BAND + _ROW_GAP
  shown = "" if len(packed) == len(image.patches) else f"The first {len(packed)} rows. "
  note = f"{shown}#pair, patches across x down. Tokens attend within their own colour only; hatched is padding."
  canvas.text(_MARGIN, height - _MARGIN - 14, note, 11, _SOFT)
  canvas.text(_MARGIN, height - _MARGIN + 2, credit, 9, _SOFT)
  return np.asarray(canvas.picture)


def _segments(image: ImageBatch, row: int, patch_size: int) -> list[_Segment]:
  """Returns the images of a row, in order."""
  numbers, patches, coords = (np.asarray(a)[row] for a in (image.segment_ids, image.patches, image.coords))
  found = []
  for number in range(1, int(numbers.max()) + 1):
    at = np.flatnonzero(numbers == number)
    pair = int(np.flatnonzero((np.asarray(image.locations) == (row, number)).all(axis=1))[0])
    frames = join(patches[at][None], coords[at], patch_size)[0]
    t, y, x = (coords[at].max(axis=0) + 1).tolist()
    pixels = np.concatenate(list(frames[:: len(frames) // t]), axis=1)
    means = patches[at].reshape(len(at), -1, 3).mean(axis=1).astype(int)
    found.append(_Segment(pair, int(at[0]), (t, y, x), pixels, means))
  return found


class _Canvas:
  """Draws in units of image pixels."""

  def __init__(self, picture: Image.Image, scale: int):
    self.picture, self._scale = picture, scale
    self._draw = ImageDraw.Draw(picture)

  def text(self, x: _Place, y: _Place, words: str, size: int, colour: tuple[int, int, int]) -> None:
    """Writes words, top left at (x, y)."""
    self._draw.text(self._at(x, y), words, colour, ImageFont.load_default(size * self._scale))

  def width(self, words: str, size: int) -> float:
    """Returns how wide words would be."""
    return self._draw.textlength(words, ImageFont.load_default(size * self._scale)) / self._scale

  def box(self, left: _Place, top: _Place, right: _Place, bottom: _Place, colour: tuple[int, int, int]) -> None:
    """Fills a rectangle, the far edges not included."""
    (x0, y0), (x1, y1) = self._at(left, top), self._at(right, bottom)
    if x1 > x0 and y1 > y0:
      self._draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)

  def hatch(self, left: _Place, top: _Place, right: _Place, bottom: _Place) -> None:
    """Fills a rectangle with diagonal lines."""
    (x0, y0), (x1, y1) = self._at(left, top), self._at(right, bottom)
    if x1 <= x0 or y1 <= y0:
      return
    tile = Image.new("RGB", (x1 - x0, y1 - y0), (247, 247, 245))
    lines, step = ImageDraw.Draw(tile), 5 * self._scale
    for x in range(-(y1 - y0), x1 - x0 + step, step):
      lines.line((x, y1 - y0, x + y1 - y0, 0), fill=_HATCH, width=self._scale)
    self.picture.paste(tile, (x0, y0))

  def image(self, pixels: np.ndarray, left: _Place, top: _Place, width: int, height: int) -> None:
    """Pastes an image in a size."""
    size = (width * self._scale, height * self._scale)
    self.picture.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), self._at(left, top))

  def _at(self, x: _Place, y: _Place) -> tuple[int, int]:
    return round(x * self._scale), round(y * self._scale)


def _draw_row(
  canvas: _Canvas, row: list[_Segment], number: int, top: _Place, tallest: int, token: _Place, length: int
) -> None:
  """Draws one row: labels, images standing on their tints, and the band of tokens."""
  left = _MARGIN + _GUTTER
  floor = top + _LABEL + 2 * _PAD + tallest
  canvas.text(_MARGIN, floor + _PAD, f"row {number}", 11, _SOFT)
  end = left
  for order, segment in enumerate(row):
    tint = np.array(_TINTS[order % len(_TINTS)])
    start, end = left + token * segment.start, left + token * (segment.start + segment.size)
    height, width = segment.pixels.shape[:2]
    fit = min(1.0, (end - start - 2) / width)
    width, height = max(1, round(width * fit)), max(1, round(height * fit))
    ceiling = floor - height - 2 * _PAD
    canvas.box(start, ceiling, end - 1, floor + _PAD, _mixed(tint, 0.16))
    canvas.image(segment.pixels, (start + end - 1 - width) / 2, floor - height - _PAD, width, height)
    _label(canvas, segment, start, ceiling - _LABEL - 3, end - start, tuple(tint.tolist()))
    canvas.box(start, floor, end - 1, floor + 3, tuple(tint.tolist()))
    for k, colour in enumerate(segment.means.tolist()):
      x = start + k * token
      canvas.box(x, floor + 3, min(x + token, end - 1), floor + _PAD + _BAND, tuple(colour))
    canvas.box(start, floor + _PAD + _BAND, end - 1, floor + _PAD + _BAND + 1, tuple(tint.tolist()))
  canvas.hatch(end, floor - min(tallest, 3 * _BAND), left + token * length, floor + _PAD + _BAND + 1)


def _label(
  canvas: _Canvas, segment: _Segment, x: _Place, y: _Place, room: _Place, colour: tuple[int, int, int]
) -> None:
  """Writes the pair and the grid, as much of it as there is room for."""
  t, rows, columns = segment.grid
  grid = f"{columns}x{rows}" + (f"x{t}" if t > 1 else "")
  for words in (f"#{segment.pair}  {grid}", f"#{segment.pair}"):
    if canvas.width(words, 10) <= room - 2:
      canvas.text(x, y, words, 10, colour)
      return


def _mixed(tint: np.ndarray, share: _Place) -> tuple[int, int, int]:
  return tuple((share * tint + (1 - share) * 255).astype(int).tolist())
