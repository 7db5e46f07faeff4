"""The remaining time: compilation and other waits do not count, and a change of pace is followed."""

import pytest

from contrastive_jax.training.metrics import Pace


def pace_of(intervals, first=100.0):
  """The pace after a first step that ended at `first` and steps that took `intervals`."""
  pace, now = Pace(), first
  pace.step(now)
  for seconds in intervals:
    now += seconds
    pace.step(now)
  return pace


def test_nothing_is_said_of_the_first_step():
  assert Pace().remaining(10_000) is None
  assert pace_of([]).remaining(10_000) is None


@pytest.mark.parametrize("compilation", [0.0, 25.0, 3600.0])
def test_the_compilation_of_the_first_step_is_left_out(compilation):
  assert pace_of([0.5], first=compilation).remaining(999) == pytest.approx(499.5)


@pytest.mark.parametrize("wait", [30.0, 600.0])
@pytest.mark.parametrize("at", [1, 10, 30])
def test_an_evaluation_or_a_later_compilation_is_left_out(wait, at):
  intervals = [0.5] * 40
  intervals[at] = wait
  assert pace_of(intervals).remaining(1000) == pytest.approx(500)


def test_steps_that_take_turns_are_averaged():
  assert pace_of([0.5, 1.5] * 40).remaining(100) == pytest.approx(100)


@pytest.mark.parametrize("later", [0.1, 2.0])
def test_a_stage_of_another_pace_is_followed(later):
  assert pace_of([0.5] * 500 + [later] * Pace.RECENT).remaining(10) == pytest.approx(10 * later)


def test_nothing_remains_at_the_end():
  assert pace_of([0.5] * 3).remaining(0) == 0
