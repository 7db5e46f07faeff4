"""Curves over training steps, or another quantity, as geometry: a template draws them as SVG in the page's colours."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 28
# Width of a letter of the labels.
LETTER = 6.0
# More points than this cannot be told apart at the width of a page.
MOST_POINTS = 300
# What lies on the x axis where nothing else is said.
STEPS = "training steps"


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve.

  Attributes:
    name: name of the curve in the legend.
    hue: number of its colour, from 0; a curve keeps its colour when others are left out.
    points: the points of its SVG polyline.
    last: the last value, as text; nothing where the x axis is not that of steps.
    ends: centre of the mark at the last point.
    kind: "main", or "faint" for raw values behind their smoothed curve.
    marks: centres of all points where they are few, else none.
  """

  name: str
  hue: int
  points: str
  last: str
  ends: tuple[float, float]
  kind: str
  marks: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Boundary:
  """The beginning of a stage.

  Attributes:
    x: its place on the x axis.
    name: name of the stage.
    fits: whether there is room for the name.
  """

  x: float
  name: str
  fits: bool


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines on common axes; ticks are (position, text).

  Attributes:
    title: name of the plotted quantity.
    lines: the curves, at least one.
    x_ticks: the ticks of the steps.
    y_ticks: the ticks of the values.
    several: whether there could be more than one curve, so that each needs its name.
    stages: where each stage of the run begins.
    over: name of the quantity on the x axis.
  """

  title: str
  lines: tuple[Line, ...]
  x_ticks: tuple[tuple[float, str], ...]
  y_ticks: tuple[tuple[float, str], ...]
  several: bool
  stages: tuple[Boundary, ...] = ()
  over: str = STEPS


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
  """Returns (step, value) of the rows that have a finite number under `key`."""
  found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
  return [(float(step), float(value)) for step, value in found if math.isfinite(value)]


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
  """Averages each point with up to `window` neighbours on either side, fewer at the ends, as many on both sides."""
  totals = [0.0]
  for _, value in points:
    totals.append(totals[-1] + value)
  means = []
  for index, (step, _) in enumerate(points):
    reach = min(window, index, len(points) - 1 - index)
    means.append((step, (totals[index + reach + 1] - totals[index - reach]) / (2 * reach + 1)))
  return means


def chart(
  title: str,
  named: Mapping[str, Sequence[tuple[float, float]]],
  *,
  last_step: float,
  smooth: bool = False,
  from_zero: bool = False,
  percent: bool = False,
  stages: Sequence[tuple[str, float]] = (),
  first_step: float = 0.0,
  over: str = STEPS,
) -> Chart | None:
  """Places curves on common axes.

  Args:
    title: title of the chart.
    named: (step, value) points of each curve, by its name; curves with fewer than two are left out.
    last_step: the end of the x axis, which is that of all charts of one run, so that they line up.
    smooth: whether the raw values are drawn faint, and their moving mean over them.
    from_zero: whether the y axis starts at zero.
    percent: whether values are fractions, written as percentages.
    stages: (name, first step) of each stage of the run, in order.
    first_step: the beginning of the x axis.
    over: name of the quantity on the x axis.

  Returns:
    The chart, or None where no curve is left.
  """
  hues = {name: hue for hue, name in enumerate(named)}
  named = {name: thinned(points) for name, points in named.items() if len(points) >= 2}
  if not named:
    return None
  values = [value for points in named.values() for _, value in points]
  x_ticks = ticks(first_step, last_step, 5)
  y_ticks = ticks(0.0 if from_zero else min(values), max(values), 4)
  low_y, high_y = y_ticks[0], y_ticks[-1]

  def x(step: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first_step) / (last_step - first_step), 1)

  def y(value: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low_y) / (high_y - low_y), 1)

  def line(name: str, points: Sequence[tuple[float, float]], kind: str) -> Line:
    places = [(x(step), y(value)) for step, value in points]
    return Line(
      name=name,
      hue=hues[name],
      points=" ".join(f"{px},{py}" for px, py in places),
      last=_text(points[-1][1], percent, digits=3) if over == STEPS else "",
      ends=places[-1],
      kind=kind,
      marks=tuple(places) if len(places) <= 16 and kind == "main" else (),
    )

  places = [*(x(first) for _, first in stages), float(WIDTH - RIGHT)]
  boundaries = tuple(
    Boundary(place, name, fits=after - place >= LETTER * (len(name) + 1))
    for (name, _), place, after in zip(stages, places, places[1:], strict=False)
  )
  lines = []
  for name, points in named.items():
    if smooth and len(points) > 16:
      lines.append(line(name, points, "faint"))
      points = smoothed(points, max(1, len(points) // 40))
    lines.append(line(name, points, "main"))
  return Chart(
    title=title,
    lines=tuple(lines),
    x_ticks=tuple((x(tick), _text(tick)) for tick in x_ticks if first_step <= tick <= last_step),
    y_ticks=tuple((y(tick), _text(tick, percent)) for tick in y_ticks),
    several=len(hues) > 1,
    stages=boundaries,
    over=over,
  )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Reduces a curve to at most `MOST_POINTS` points, means of equally many neighbours; the last point is kept."""
  size = -(-len(points) // MOST_POINTS)
  if size == 1:
    return list(points)
  pieces = [points[start : start + size] for start in range(0, len(points) - 1, size)]
  means = [tuple(sum(column) / len(piece) for column in zip(*piece, strict=True)) for piece in pieces]
  return [*means[:-1], points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
  """Returns about `count` round numbers that enclose the interval, 1, 2 or 5 times a power of ten apart."""
  if high <= low:
    high = low + (abs(low) or 1.0)
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  # Twelve digits, not twelve decimals: what is below 1e-12 would become one tick, and its chart has no height.
  return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _text(value: float, percent: bool = False, digits: int = 6) -> str:
  if percent:
    return f"{100 * value:.{digits}g}%"
  if abs(value) >= 10_000:
    return f"{value / 1000:.4g}k"
  if 0 < abs(value) < 0.001:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  text = f"{value:.{digits}g}"
  return f"{value:.0f}" if "e" in text else text  # 1450, which to three digits would be 1.45e+03.
