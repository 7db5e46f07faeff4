"""Assignment of items to rows: filled to the last token where that can be done, with the least shrinking where not."""

import heapq
import math
from collections.abc import Callable, Sequence

from contrastive_jax.errors import UserError

# The extent of an item, (t, y, x) of an image and (n,) of a caption; its product is the number of its tokens.
State = tuple[int, ...]


def fill_rows(sizes: Sequence[int], rows: int, length: int) -> list[int] | None:
  """Gives each item a row.

  Row by row it takes the set of remaining items that fills the row best, by the subset sums of their sizes; of equally
  good sets the one with the largest items, so that the items left for the last rows are small and fill them as well.

  Args:
    sizes: the size of each item, at least 1.
    rows: number of rows.
    length: length of a row.

  Returns:
    The row of each item; None where they do not fit this way.

  Examples:
    >>> fill_rows([6, 5, 4, 3, 2], rows=2, length=10)
    [0, 1, 0, 1, 1]
  """
  spare = rows * length - sum(sizes)
  row_of = [-1] * len(sizes)
  remaining: dict[int, list[int]] = {}  # Items by size, ascending; the last of each list goes first.
  for item in sorted(range(len(sizes)), key=lambda item: (sizes[item], -item)):
    remaining.setdefault(sizes[item], []).append(item)
  # Bit n of a number says whether some of the items have the size n together.
  within = (1 << (length + 1)) - 1
  for row in range(rows):
    if spare < 0 or not remaining:
      break
    sums, steps = 1, []
    for size, items in remaining.items():
      for _ in range(min(len(items), length // size)):
        steps.append((size, sums))
        sums = (sums | sums << size) & within
    rest = sums.bit_length() - 1
    spare -= length - rest
    for size, without in reversed(steps):
      if size <= rest and without >> (rest - size) & 1:
        row_of[remaining[size].pop()] = row
        rest -= size
    remaining = {size: items for size, items in remaining.items() if items}
  return None if remaining else row_of


def search_rows(sizes: Sequence[int], rows: int, length: int, *, most: int = 20_000) -> list[int] | None:
  """Gives each item a row by trying all ways, the largest items first; None where none fits or `most` were tried.

  It finds what `fill_rows` overlooks with three rows or more.

  Examples:
    >>> search_rows([6, 5, 4, 3, 2], rows=2, length=10)
    [0, 1, 0, 1, 1]
  """
  order = sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
  free, row_of, tried = [length] * rows, [-1] * len(sizes), 0

  def place(depth: int) -> bool:
    nonlocal tried
    if depth == len(order):
      return True
    item, seen = order[depth], set()
    for row in range(rows):
      # Of rows with equal room one is as good as another.
      if sizes[item] > free[row] or free[row] in seen:
        continue
      tried += 1
      if tried > most:
        return False
      seen.add(free[row])
      free[row] -= sizes[item]
      row_of[item] = row
      if place(depth + 1):
        return True
      free[row] += sizes[item]
    return False

  # Deeper than Python recurses there are too many ways to try them all.
  fits = sum(sizes) <= rows * length and len(sizes) <= 64 and place(0)
  return row_of if fits else None


def shrink_to_fit(
  wanted: Sequence[State],
  rows: int,
  length: int,
  smaller: Callable[[int, State], State | None],
  what: str,
  size: Callable[[State], int] = math.prod,
) -> tuple[list[State], list[int]]:
  """Makes items fit into rows: in each turn the largest, of equals the first, gets one step smaller.

  Args:
    wanted: the extent that each item asks for.
    rows: number of rows.
    length: length of a row.
    smaller: a function of an item and its extent that returns the next smaller one, or None where there is none.
    what: name of the items in the error.
    size: a function of an extent that returns its number of tokens, which does not grow when an item gets smaller.

  Returns:
    The extents after the fewest turns found, and the row of each item. One turn fewer would not fit.

  Raises:
    UserError: if they do not fit however small, as far as `fill_rows` and `search_rows` can tell.

  Examples:
    >>> def one_less(item, extent):
    ...   return (extent[0] - 1,) if extent[0] > 1 else None
    >>> shrink_to_fit([(5,), (3,)], 1, 6, one_less, "captions")
    ([(3,), (3,)], [0, 0])
  """
  sizes = [size(state) for state in wanted]
  turns: list[tuple[int, State]] = []
  taker = _Turns(wanted, sizes, smaller, size)

  def attempt(count: int) -> list[int] | None:
    tried = list(sizes)
    for item, state in turns[:count]:
      tried[item] = size(state)
    return fill_rows(tried, rows, length)

  more = True
  while more and (taker.total > rows * length or taker.largest > length):
    more = taker.take(turns)
  failed, step = len(turns), 1
  row_of = attempt(failed)
  while row_of is None and more:
    failed = len(turns)
    for _ in range(step):
      more = more and taker.take(turns)
    step *= 2
    row_of = attempt(len(turns))
  if row_of is None:
    smallest = list(sizes)
    for item, state in turns:
      smallest[item] = size(state)
    row_of = search_rows(smallest, rows, length)
    failed = len(turns) - 1
  if row_of is None:
    raise UserError(
      f"{rows} rows of {length} tokens are too few for the {len(wanted)} {what} of a pack, even at their smallest:"
      " give it more or longer rows"
    )
  fits = len(turns)
  while fits - failed > 1:
    middle = (failed + fits) // 2
    fewer = attempt(middle)
    if fewer is None:
      failed = middle
    else:
      fits, row_of = middle, fewer
  final = list(wanted)
  for item, state in turns[:fits]:
    final[item] = state
  return final, row_of


class _Turns:
  """Takes turns, and knows what they have come to."""

  def __init__(
    self,
    wanted: Sequence[State],
    sizes: Sequence[int],
    smaller: Callable[[int, State], State | None],
    size: Callable[[State], int],
  ):
    self._states, self._smaller, self._size = list(wanted), smaller, size
    self._heap = [(-size, item) for item, size in enumerate(sizes)]
    heapq.heapify(self._heap)
    self.total = sum(sizes)
    self._stuck = 0

  @property
  def largest(self) -> int:
    """Size of the largest item."""
    return max(self._stuck, -self._heap[0][0] if self._heap else 0)

  def take(self, turns: list[tuple[int, State]]) -> bool:
    """Adds a turn; False where no item can get smaller."""
    while self._heap:
      size, item = heapq.heappop(self._heap)
      state = self._smaller(item, self._states[item])
      if state is None:
        self._stuck = max(self._stuck, -size)
        continue
      self._states[item] = state
      self.total += size + self._size(state)
      heapq.heappush(self._heap, (-self._size(state), item))
      turns.append((item, state))
      return True
    return False
