"""Histograms: every value is counted once, in a bar whose place and label say the same."""

import itertools
import math
import re

import numpy as np
import pytest

from contrastive_jax.evaluation.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from contrastive_jax.evaluation.histograms import aspects, histogram, ratios

THINGS = ("thing", "things")


def counted(chart):
  """(lowest, highest, count) of each bar, by its label."""
  found = [
    re.fullmatch(r"(\d+)(?: to (\d+))?(?: px)?: (\d+) things?", bar.label.replace(",", "")) for bar in chart.bars
  ]
  return [(int(each[1]), int(each[2] or each[1]), int(each[3])) for each in found]


@pytest.mark.parametrize("low, high", [(1, 3), (7, 46), (7, 47), (100, 1500), (3, 4000), (1, 100_000), (0, 90)])
@pytest.mark.parametrize("limit", [None, 20, 77])
@pytest.mark.parametrize("skew", [1, 8])
def test_every_value_is_counted_in_the_bar_that_says_so(rng, low, high, limit, skew):
  values = [low, high, *(low + (high - low) * rng.random(500) ** skew).astype(int).tolist()]
  chart = histogram("Size", values, THINGS, unit="px", limit=limit)
  bars = counted(chart)
  for bar_low, bar_high, count in bars:
    assert count == sum(bar_low <= value <= bar_high for value in values) > 0
  assert sum(count for *_, count in bars) == len(values)
  assert all(before[1] < after[0] for before, after in itertools.pairwise(bars)) and len(bars) <= 60
  if limit is not None:
    assert [bar.beyond for bar in chart.bars] == [bar_low > limit for bar_low, *_ in bars]
    assert all(bar_low > limit or bar_high <= limit for bar_low, bar_high, _ in bars)
  assert chart.summary == f"median {np.median(values):,.0f}, {low:,} to {high:,} px" or np.median(values) % 1


@pytest.mark.parametrize("values", [[1, 2], [3] * 9 + [4], [10] * 2000 + [5000], list(range(200))])
def test_all_that_is_drawn_lies_within_the_axes(values):
  chart = histogram("Size", values, THINGS, limit=4)
  counts = [count for *_, count in counted(chart)]
  tallest = max(chart.bars, key=lambda bar: bar.height)
  for bar, count in zip(chart.bars, counts, strict=True):
    assert bar.x >= LEFT and bar.x + bar.width <= WIDTH - RIGHT + 0.2
    assert bar.y >= TOP - 0.1 and bar.y + bar.height == pytest.approx(HEIGHT - BOTTOM, abs=0.2)
    # A single one among thousands is seen too.
    assert bar.height == pytest.approx(max(2.0, tallest.height * count / max(counts)), abs=0.2)
  assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in chart.x_ticks) and chart.x_ticks
  assert len({text for _, text in chart.x_ticks}) == len(chart.x_ticks)


def test_the_limit_lies_between_what_is_kept_and_what_is_cut():
  chart = histogram("Tokens", list(range(1, 200)), THINGS, limit=77)
  kept, cut = ([bar for bar in chart.bars if bar.beyond == beyond] for beyond in (False, True))
  assert kept[-1].x + kept[-1].width <= chart.limit <= cut[0].x
  assert histogram("Tokens", [1, 2], THINGS, limit=77).limit is None


def test_equal_values_are_said_and_not_drawn():
  chart = histogram("Width", [640] * 12, THINGS, unit="px")
  assert chart.summary == "all 640 px" and not chart.bars
  assert histogram("Width", [], THINGS) is None and aspects("Shape", [], THINGS) is None


@pytest.mark.parametrize(("low", "high"), [(0.005, 1.0), (0.0099, 0.0101), (3.0, 5e6)])
def test_positive_numbers_are_counted_once_in_bars_of_equal_ratio(rng, low, high):
  values = np.float32([low, high, *np.exp(rng.uniform(np.log(low), np.log(high), 300))])
  chart = ratios("Temperature", values, THINGS)
  counts = [int(bar.label.split(": ")[-1].split()[0]) for bar in chart.bars]
  assert sum(counts) == len(values) and 20 <= len(counts) <= 28 and len(chart.x_ticks) >= 2
  (one, first), (other, last) = ((x, float(text.replace(",", ""))) for x, text in (chart.x_ticks[0], chart.x_ticks[-1]))
  # A tick lies where the logarithm of its number does.
  for at, value in ((one, first), (other, last)):
    place = LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / math.log(high / low)
    assert at == pytest.approx(place, abs=0.2)
  assert not ratios("Temperature", np.full(5, 0.01), THINGS).bars and ratios("Temperature", np.zeros(0), THINGS) is None


def test_shapes_are_ratios_with_squares_in_the_middle_of_a_bar():
  chart = aspects("Shape", [1.0, 1.05, 1 / 1.05, 4 / 3, 0.5, 16 / 9, 3.0], THINGS)
  square = next(bar for bar in chart.bars if bar.label.endswith(": 3 things"))
  place = dict((text, x) for x, text in chart.x_ticks)
  assert square.x + square.width / 2 == pytest.approx(place["1:1"], abs=0.6)
  # Logarithmic: twice as wide is as far from a square as twice as high.
  assert place["2:1"] - place["1:1"] == pytest.approx(place["1:1"] - place["1:2"], abs=0.2)
  assert sum(int(bar.label.split(": ")[-1].split()[0]) for bar in chart.bars) == 7
  assert chart.summary == "median 1.05:1, 1:2 to 3:1"
  assert math.isfinite(aspects("Shape", [0.001, 500.0], THINGS).bars[0].x)
