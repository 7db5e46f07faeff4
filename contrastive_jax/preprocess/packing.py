"""Packing: the images or captions of a pack of pairs, laid side by side in rows of one length.

First a plan is made from sizes alone, so that images which are too large for the rows are rendered smaller in the first
place; then the pixels or tokens are put where the plan says. All is a pure function of the sizes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8

from contrastive_jax.batch import ImageBatch, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.dropping import kept_count
from contrastive_jax.preprocess.rows import State, shrink_to_fit

# Patches and their coordinates. Anonymous sizes: those of the images in one list differ.
Patches = tuple[UInt8[np.ndarray, "_ _"], Int16[np.ndarray, "_ 3"]]


@dataclasses.dataclass(frozen=True)
class Placement:
  """A plan that says where each item of a pack lies.

  Attributes:
    rows: number of rows.
    length: length of a row in tokens.
    sizes: number of tokens of each item, as it is placed.
    locations: (row, segment) of each item; the segments of a row are numbered from 1 in the order of the items.
    starts: first token of each item in its row. A row is filled from its beginning without gaps.
  """

  rows: int
  length: int
  sizes: Int[np.ndarray, "items"]
  locations: Int[np.ndarray, "items 2"]
  starts: Int[np.ndarray, "items"]

  @property
  def fill(self) -> float:
    """Share of the rows' tokens that are real."""
    return float(self.sizes.sum()) / (self.rows * self.length)

  def cells(self) -> Int[np.ndarray, "tokens"]:
    """Returns the index of every token of every item, in order, into the rows laid end to end."""
    first = self.locations[:, 0].astype(np.int64) * self.length + self.starts
    within = np.arange(self.sizes.sum()) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
    return np.repeat(first, self.sizes) + within

  def spread(self, values: Int[np.ndarray, "items n"]) -> Int16[np.ndarray, "rows length n"]:
    """Gives every token of the rows the values of its item; 1 where there is none."""
    found = np.ones((self.rows * self.length, values.shape[1]), np.int16)
    found[self.cells()] = np.repeat(values, self.sizes, axis=0)
    return found.reshape(self.rows, self.length, -1)

  def segment_ids(self) -> Int16[np.ndarray, "rows length"]:
    """Returns the segment of every token of the rows, 0 where there is none."""
    segment_ids = np.zeros(self.rows * self.length, np.int16)
    segment_ids[self.cells()] = np.repeat(self.locations[:, 1], self.sizes)
    return segment_ids.reshape(self.rows, self.length)


@dataclasses.dataclass(frozen=True)
class PackedGrids(Placement):
  """A plan for images or clips.

  Attributes:
    wanted: patches along (t, y, x) that each image asked for.
    grids: patches along (t, y, x) that it got.
  """

  wanted: Int[np.ndarray, "items 3"]
  grids: Int[np.ndarray, "items 3"]

  @property
  def factors(self) -> Float[np.ndarray, "items"]:
    """Sides of each image relative to those it asked for, as the geometric mean of both; 1 where it was not shrunk."""
    return np.sqrt(self.grids[:, 1:].prod(axis=1) / self.wanted[:, 1:].prod(axis=1))

  @property
  def shrunk(self) -> int:
    """Number of images that were made smaller."""
    return int((self.grids != self.wanted).any(axis=1).sum())

  @property
  def dropped(self) -> int:
    """Number of patches that were lost by making images smaller."""
    return int(self.wanted.prod(axis=1).sum() - self.grids.prod(axis=1).sum())


@dataclasses.dataclass(frozen=True)
class PackedTexts(Placement):
  """A plan for captions.

  Attributes:
    wanted: number of tokens of each caption before any was cut.
  """

  wanted: Int[np.ndarray, "items"]

  @property
  def truncated(self) -> int:
    """Number of captions that were cut."""
    return int((self.sizes < self.wanted).sum())

  @property
  def dropped(self) -> int:
    """Number of tokens that were cut."""
    return int((self.wanted - self.sizes).sum())


def pack_grids(
  grids: Int[np.ndarray, "items 3"], *, rows: int, length: int, min_tokens: int = 1, drop_patches: float = 0.0
) -> PackedGrids:
  """Plans the rows of the images or clips of one pack.

  Where they do not fit, the largest of them loses a row or a column of patches, whichever keeps its shape better, again
  and again until they do: no image gets smaller than it must while a larger one could give way instead.

  Args:
    grids: the numbers of patches along (t, y, x) that each asks for.
    rows: number of rows of the pack.
    length: length of a row in tokens.
    min_tokens: number of patches below which no image is shrunk.
    drop_patches: share of the patches of each image that are dropped and take no room.

  Raises:
    UserError: if no way to shrink and to place them was found.

  Examples:
    >>> plan = pack_grids(np.array([[1, 2, 3], [1, 2, 2], [1, 1, 2]]), rows=1, length=10)
    >>> plan.grids.tolist(), plan.segment_ids().tolist()
    ([[1, 2, 2], [1, 2, 2], [1, 1, 2]], [[1, 1, 1, 1, 2, 2, 2, 2, 3, 3]])
  """
  wanted = np.asarray(grids, np.int64)
  asked = [tuple(grid) for grid in wanted.tolist()]

  def smaller(item: int, grid: State) -> State | None:
    (t, y, x), (_, full_y, full_x) = grid, asked[item]
    # Of the two sides the one that has lost the smaller share, and of equals the longer one.
    row = x == 1 or (y > 1 and (y * full_x, y) >= (x * full_y, x))
    y, x = (y - 1, x) if row else (y, x - 1)
    least = max(1, min_tokens)
    return (t, y, x) if t * y * x >= least else _largest_below(math.prod(grid), least, asked[item])

  def size(grid: State) -> int:
    return kept_count(math.prod(grid), drop_patches)

  final, row_of = shrink_to_fit(asked, rows, length, smaller, "images", size)
  got = np.array(final, np.int64).reshape(-1, 3)
  sizes = np.array([size(grid) for grid in final], np.int64)
  return PackedGrids(rows, length, sizes, *_laid(sizes, row_of), wanted, got)


def _largest_below(tokens: int, least: int, asked: State) -> State | None:
  """Returns the largest part of a grid with fewer than `tokens` and at least `least` tokens, of equals the best shape.

  None where no part has so many.
  """
  t, full_y, full_x = asked
  parts = ((t, y, min(full_x, (tokens - 1) // (t * y))) for y in range(1, full_y + 1))

  def shape(part: State) -> float:
    _, y, x = part
    return max(y * full_x, x * full_y) / min(y * full_x, x * full_y)

  enough = [part for part in parts if math.prod(part) >= least]
  return max(enough, key=lambda part: (math.prod(part), -shape(part)), default=None)


def place_images(patches: Sequence[Patches], packed: PackedGrids) -> ImageBatch:
  """Puts images or clips where the plan says.

  Args:
    patches: the patches of each, as many as its plan says, and their coordinates.
    packed: the plan.

  Raises:
    ValueError: if an image has another number of patches.

  Examples:
    >>> plan = pack_grids(np.array([[1, 1, 1], [1, 1, 2]]), rows=1, length=4)
    >>> images = [(np.full((n, 12), n, np.uint8), np.zeros((n, 3), np.int16)) for n in (1, 2)]
    >>> place_images(images, plan).patches[..., 0].tolist()
    [[1, 2, 2, 0]]
  """
  batch = ImageBatch(
    np.zeros((packed.rows, packed.length, patches[0][0].shape[1]), np.uint8),
    np.zeros((packed.rows, packed.length, 3), np.int16),
    packed.segment_ids(),
    packed.locations,
  )
  for (pixels, coords), size, row, start in zip(
    patches, packed.sizes, packed.locations[:, 0], packed.starts, strict=True
  ):
    if len(pixels) != size:
      raise ValueError(f"an image has {len(pixels)} patches, its plan says {size}")
    batch.patches[row, start : start + size] = pixels
    batch.coords[row, start : start + size] = coords
  return batch


def pack_texts(lengths: Int[np.ndarray, "items"], *, rows: int, length: int) -> PackedTexts:
  """Plans the rows of the captions of one pack.

  Where they do not fit, the longest of them loses a token, again and again until they do.

  Args:
    lengths: number of tokens of each caption. An empty one takes the room of one token of padding.
    rows: number of rows of the pack.
    length: length of a row in tokens.

  Raises:
    UserError: if the rows have fewer tokens than there are captions.

  Examples:
    >>> plan = pack_texts(np.array([5, 3, 4]), rows=2, length=6)
    >>> plan.sizes.tolist(), plan.segment_ids().tolist(), plan.truncated
    ([3, 3, 4], [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], 1)
  """
  wanted = np.maximum(np.asarray(lengths, np.int64), 1)

  def smaller(_: int, state: State) -> State | None:
    return (state[0] - 1,) if state[0] > 1 else None

  final, row_of = shrink_to_fit([(n,) for n in wanted.tolist()], rows, length, smaller, "captions")
  sizes = np.array(final, np.int64).reshape(-1)
  return PackedTexts(rows, length, sizes, *_laid(sizes, row_of), wanted)


def place_texts(tokens: Int[np.ndarray, "items padded"], packed: PackedTexts) -> TextBatch:
  """Puts captions where the plan says; one that is cut keeps its last token, which ends the text.

  Args:
    tokens: the tokens of each caption, from the first column on, padded.
    packed: the plan.

  Returns:
    The rows.
  """
  every = np.arange(len(tokens))
  kept = tokens.copy()
  kept[every, packed.sizes - 1] = tokens[every, packed.wanted - 1]
  placed = np.zeros(packed.rows * packed.length, np.int32)
  placed[packed.cells()] = kept[np.arange(tokens.shape[1]) < packed.sizes[:, None]]
  return TextBatch(placed.reshape(packed.rows, packed.length), None, packed.segment_ids(), packed.locations)


def capacity(mean: float, std: float, *, pairs: int, fill: float = 0.95) -> int:
  """Finds how many tokens the rows of a pack should have: the most that are expected to be filled to a share of `fill`.

  Fewer tokens waste less, and shrink more. The sum of a pack's sizes is taken as normally distributed, and whatever
  exceeds the rows as shrunk.

  Args:
    mean: mean number of tokens of an image or a caption.
    std: standard deviation of that number.
    pairs: number of pairs of a pack.
    fill: the share of real tokens to expect, below 1.

  Examples:
    >>> capacity(100.0, 0.0, pairs=8, fill=0.8), capacity(100.0, 50.0, pairs=8, fill=0.8)
    (1000, 992)
  """
  total, spread = pairs * mean, math.sqrt(pairs) * std

  def expected(tokens: int) -> float:
    if not spread:
      return min(1.0, total / tokens)
    z = (tokens - total) / spread
    over = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - z * math.erfc(z / math.sqrt(2)) / 2
    return (total - spread * over) / tokens

  few, many = 1, 1 + math.ceil(2 * (total + spread) / fill)
  while many - few > 1:
    middle = (few + many) // 2
    few, many = (middle, many) if expected(middle) >= fill else (few, middle)
  return few


def row_shape(tokens: int, *, least: int, multiple: int = 128) -> tuple[int, int]:
  """Finds the shortest rows that have a number of tokens, or up to 0.5% less, together; else those that come closest.

  Args:
    tokens: number of tokens of all rows, such as `capacity` returns.
    least: the shortest length of a row. Rows of four times the longest item waste next to nothing, of twice the longest
      about 2%; the longer they are, the more attention computes across items, where it does not skip blocks.
    multiple: a number that divides the length; kernels of TPUs and GPUs want 128.

  Returns:
    Number of rows and their length, which is at most a quarter longer than it must be.

  Raises:
    UserError: if there are not tokens enough for a row.

  Examples:
    >>> row_shape(4096, least=1000)
    (4, 1024)
  """
  shortest = -(-least // multiple) * multiple
  lengths = [n for n in range(shortest, shortest * 5 // 4 + 1, multiple) if n <= tokens]
  if not lengths:
    raise UserError(f"{tokens} tokens are too few for a row of {shortest}: pack more pairs, or shorten the rows")
  enough = [n for n in lengths if tokens // n * n >= 0.995 * tokens]
  length = enough[0] if enough else max(lengths, key=lambda n: tokens // n * n)
  return tokens // length, length


def _laid(sizes: np.ndarray, row_of: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the locations and starts of items, in the order in which the items come."""
  row = np.asarray(row_of, np.int64)
  order = np.argsort(row, kind="stable")
  first = np.searchsorted(row[order], row[order])
  before = np.cumsum(sizes[order]) - sizes[order]
  locations, starts = np.empty((len(row), 2), np.int32), np.empty(len(row), np.int64)
  locations[order] = np.stack([row[order], np.arange(len(row)) - first + 1], axis=1)
  starts[order] = before - before[first]
  return locations, starts
