import numpy as np
import pytest

from contrastive_jax.evaluation.curves import MOST_POINTS, chart, series, smoothed, thinned, ticks


@pytest.mark.parametrize(
  ("low", "high", "count", "expected"),
  [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]),
    (0.13, 0.91, 4, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (-3, 4, 4, [-4, -2, 0, 2, 4]),
    (0, 1e-3, 4, [0, 5e-4, 1e-3]),
    (7, 7, 2, [5, 10, 15]),
  ],
)
def test_ticks_are_round_and_enclose(low, high, count, expected):
  assert ticks(float(low), float(high), count) == pytest.approx(expected)


def test_series_leaves_out_what_is_no_number():
  rows = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": "nan"}, {"step": 4, "loss": float("inf")}]
  assert series(rows, "loss") == [(1.0, 2.0)]


def test_smoothing_keeps_straight_lines_and_ends(rng):
  line = [(float(step), 3.0 * step + 1) for step in range(30)]
  np.testing.assert_allclose(smoothed(line, 4), line)
  values = rng.normal(size=30)
  found = smoothed([(float(i), float(v)) for i, v in enumerate(values)], 2)
  assert found[10][1] == pytest.approx(values[8:13].mean())
  assert (found[0][1], found[-1][1]) == pytest.approx((values[0], values[-1]))


@pytest.mark.parametrize("count", [2, MOST_POINTS, MOST_POINTS + 1, 10_000])
def test_thinning_bounds_the_points_and_keeps_the_last(count):
  points = [(float(i), 2.0 * i) for i in range(count)]
  found = thinned(points)
  assert 2 <= len(found) <= MOST_POINTS and found[-1] == points[-1]
  assert all(value == pytest.approx(2 * step) for step, value in found)


def test_one_point_is_no_curve():
  assert chart("Loss", {"loss": [(1.0, 2.0)]}, last_step=10.0) is None


def test_a_constant_is_drawn():
  drawn = chart("Rate", {"rate": [(1.0, 0.0), (2.0, 0.0)]}, last_step=2.0, from_zero=True)
  assert len(drawn.lines[0].marks) == 2 and drawn.lines[0].last == "0"


@pytest.mark.parametrize(("value", "text"), [(1449.7, "1450"), (999.6, "1000"), (12345.0, "12.35k"), (1.449, "1.45")])
def test_last_values_are_read_without_an_exponent(value, text):
  drawn = chart("Rate", {"rate": [(1.0, 0.0), (2.0, value)]}, last_step=2.0)
  assert drawn.lines[0].last == text


@pytest.mark.parametrize("size", [1e-15, 1e-30, 1e-44, 1.0, 3e38])
def test_curves_of_any_size_are_drawn(size):
  """A run that has learned all it can has losses far below what twelve decimals show."""
  points = [(float(step), size * value) for step, value in enumerate([5.0, 2.0, 3.0, 1.0])]
  for values in (points, [(step, size) for step, _ in points]):
    drawn = chart("Loss", {"loss": values}, last_step=3.0)
    heights = ticks(0.0, 5 * size, 4)
    assert len(set(heights)) == len(heights) > 2 and heights[-1] >= 5 * size
    assert drawn is not None and "nan" not in repr(drawn) and "inf" not in repr(drawn)
