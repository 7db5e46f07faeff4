"""Histograms as geometry: a template draws them as SVG in the colours of the page, on the axes of `curves`."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from contrastive_jax.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

_Number = int | float

# About how many bars are drawn, and up to how many each whole number has one of its own.
_BARS, _MOST_SINGLE = 28, 40
# Bars that there is room for at least: a few would be as wide as the page.
_FEWEST = 8
# How many times the median the largest value may be on an axis of equal steps.
_LONG_TAIL = 8
# Height of a bar that would be too low to be seen: the few that are unlike the others are what people look for.
_LOWEST = 2.0
# Between two bars, in units of the drawing.
_GAP = 1.0


@dataclasses.dataclass(frozen=True)
class Bar:
  """One bar.

  Attributes:
    x: its left edge.
    y: its top.
    width: its width.
    height: its height.
    label: the values that it counts, and how many there are.
    beyond: whether these values are above the limit.
  """

  x: float
  y: float
  width: float
  height: float
  label: str
  beyond: bool = False


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Bars on axes; ticks are (position, text).

  Attributes:
    title: name of the quantity.
    summary: its smallest, median and largest value.
    bars: the bars that are not empty; none where all values are equal, which the summary says.
    x_ticks: the ticks of the values.
    y_ticks: the ticks of the counts.
    limit: the place of the limit on the x axis, if it lies within, else None.
  """

  title: str
  summary: str
  bars: tuple[Bar, ...]
  x_ticks: tuple[tuple[float, str], ...]
  y_ticks: tuple[tuple[float, str], ...]
  limit: float | None = None


def histogram(
  title: str, values: Sequence[int], what: tuple[str, str], *, unit: str = "", limit: int | None = None
) -> Histogram | None:
  """Counts whole numbers in bars of equal width, or of equal ratio where few values are much larger than most.

  Args:
    title: name of the quantity.
    values: the numbers, from 0 on.
    what: the thing that has the quantity, as one and as several: ("picture", "pictures").
    unit: the unit of the quantity, such as "px".
    limit: the largest value that is not above the limit; None where there is no limit.

  Returns:
    The histogram, or None without values.
  """
  if not len(values):
    return None
  low, high = min(values), max(values)
  # A bar ends at the limit, so that none holds values of both sides.
  origin = 0 if limit is None else limit + 1
  if low > 0 and high > _LONG_TAIL * np.median(values):
    edges = _ratios(low, high, 4 if high < 256 * low else 2)
    marks = [2**k for k in range(math.ceil(math.log2(edges[0])), math.floor(math.log2(edges[-1])) + 1)]
    between = [origin] if edges[0] < origin < edges[-1] else []
    whole = sorted({*map(math.ceil, edges), *between})
    return _placed(title, values, whole, marks[:: -(-len(marks) // 8)], what, unit, limit, log=True)
  step = max(1, round(ticks(0.0, float(high - low), _BARS)[1])) if high - low >= _MOST_SINGLE else 1
  first = (low - origin) // step * step + origin
  edges = [first + step * k for k in range(max(_FEWEST, (high - first) // step + 1) + 1)]
  edges[0] = max(0, first)
  marks = [
    mark
    for mark in ticks(float(low), float(max(high, low + 1)), 6)
    if edges[0] <= mark <= edges[-1] and mark == int(mark)
  ]
  return _placed(title, values, edges, marks, what, unit, limit)


def aspects(title: str, values: Sequence[float], what: tuple[str, str]) -> Histogram | None:
  """Counts ratios of width to height in bars of equal ratio, one of which has 1:1 in its middle.

  Args:
    title: name of the quantity.
    values: the ratios.
    what: the thing that has the ratio, as one and as several.

  Returns:
    The histogram, or None without values.
  """
  if not len(values):
    return None
  edges = _ratios(min(0.5, *values), max(2.0, *values), 4)
  reach = range(math.ceil(math.log2(edges[0])), math.floor(math.log2(edges[-1])) + 1)
  marks = [2.0**k for k in reach][:: -(-len(reach) // 8)]
  return _placed(title, values, edges, marks, what, "", None, log=True, named=_ratio)


def ratios(title: str, values: Float[np.ndarray, "_"], what: tuple[str, str]) -> Histogram | None:
  """Counts positive numbers in bars of equal ratio.

  Args:
    title: name of the quantity.
    values: the numbers, all above 0.
    what: the thing that has the quantity, as one and as several.

  Returns:
    The histogram, or None without values.
  """
  if not len(values):
    return None
  low, high = float(values.min()), float(values.max())
  # Numbers that are all equal are said and not drawn; the edges have to differ all the same.
  edges = np.geomspace(low, max(high, low * 1.001), _BARS + 1).tolist()
  # The last bar ends above the largest value, which would else be in no bar or beyond its own.
  edges[0], edges[-1] = low, max(high, edges[-1])
  marks = _round_ratios(edges[0], edges[-1])
  # As many digits as tell the ends apart, and two more.
  digits = 3 + max(0, -math.floor(math.log10(edges[-1] / edges[0] - 1)))
  return _placed(
    title, values.tolist(), edges, marks, what, "", None, log=True, named=lambda value: f"{value:.{digits}g}"
  )


def _round_ratios(low: float, high: float) -> list[float]:
  """Returns round numbers within an interval: 1, 2 or 5 times powers of ten, or of equal steps where it is narrow."""
  if high < 4 * low:
    return [mark for mark in ticks(low, high, 5) if low <= mark <= high]
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
  marks = [mark for mark in marks if low <= mark <= high]
  return marks[:: -(-len(marks) // 8)]


def _placed(
  title: str,
  values: Sequence[_Number],
  edges: Sequence[_Number],
  marks: Sequence[_Number],
  what: tuple[str, str],
  unit: str,
  limit: int | None,
  *,
  log: bool = False,
  named: Callable[[_Number], str] | None = None,
) -> Histogram:
  """Places the bars between the edges, of which each belongs to the bar on its right."""
  counts = np.histogram(values, edges)[0].tolist()
  y_ticks = [tick for tick in ticks(0.0, float(max(counts)), 4) if tick == int(tick)]
  # One whole number a bar: its name stands below the middle of the bar.
  single = named is None and not log and edges[2] - edges[1] == 1
  scale = math.log if log else float
  begin, end = scale(edges[0]), scale(edges[-1])

  def x(value: _Number) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - begin) / (end - begin)

  def y(count: _Number) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * count / y_ticks[-1]

  def name(low: _Number, high: _Number) -> str:
    if named:
      return f"{named(low)} to {named(high)}"
    several = f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}"
    return f"{several} {unit}".rstrip()

  low_value, high_value = min(values), max(values)
  bars = []
  for low, high, count in zip(edges, edges[1:], counts, strict=False):
    if count and low_value < high_value:
      left, top = round(x(low) + _GAP / 2, 1), round(min(y(count), HEIGHT - BOTTOM - _LOWEST), 1)
      width, height = max(1.0, round(x(high) - left - _GAP / 2, 1)), round(HEIGHT - BOTTOM - top, 1)
      label = f"{name(low, high)}: {count:,} {what[count != 1]}"
      bars.append(Bar(left, top, width, height, label, limit is not None and low > limit))
  say = named or (lambda value: f"{value:,.0f}" if value == int(value) else f"{value:,.1f}")
  middle = float(np.median(values))
  spread = f"median {say(middle)}, {say(low_value)} to {say(high_value)}"
  if low_value == high_value:
    spread = f"all {say(low_value)}"
  return Histogram(
    title=title,
    summary=f"{spread} {unit}".rstrip(),
    bars=tuple(bars),
    x_ticks=tuple((round(x(mark + 0.5 * single), 1), say(mark)) for mark in marks if mark + single <= edges[-1]),
    y_ticks=tuple((round(y(tick), 1), f"{tick:,.0f}") for tick in y_ticks),
    limit=round(x(limit + 1), 1) if limit is not None and edges[0] <= limit + 1 <= edges[-1] else None,
  )


def _ratios(low: _Number, high: _Number, each: int) -> list[float]:
  """Returns edges that enclose the interval, `each` to a factor of two; powers of two lie in the middle of a bar."""
  first, last = math.floor(each * math.log2(low) + 0.5), math.floor(each * math.log2(high) + 0.5)
  return [2 ** ((k - 0.5) / each) for k in range(first, last + 2)]


def _ratio(value: _Number) -> str:
  """Writes a ratio as photographers do: 1.5:1, 1:2."""
  big = max(value, 1 / value)
  text = f"{big:.2f}".rstrip("0").rstrip(".") if big < 100 else f"{big:,.0f}"
  return f"{text}:1" if value >= 1 else f"1:{text}"
