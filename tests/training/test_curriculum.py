"""Segments: every prefix of a mixture is fair, and cursors are sums over what came before."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax.errors import UserError
from contrastive_jax.training.curriculum import (
  Segment,
  assign,
  cursors,
  draws,
  segment_at,
  slots_before,
  total_steps,
  truncate,
)


def segment(steps=10, batch_size=8, sources=(("a", 1),), resolution=32):
  return Segment(steps, batch_size, sources, resolution)


@pytest.mark.parametrize(
  "weights", [(1,), (1, 1), (0.7, 0.3), (5, 1, 1), (0.333, 0.667), (1, 2, 3, 4, 5), (1e-3, 1.0), (0.1,) * 10]
)
def test_every_prefix_holds_each_source_within_one_sample_of_its_share(weights):
  run = segment(steps=300, batch_size=7, sources=tuple((f"s{i}", w) for i, w in enumerate(weights)))
  source, draw = assign(run, np.arange(run.slots))
  share = np.asarray(weights) / np.sum(weights)
  counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
  expected = np.arange(1, run.slots + 1)[:, None] * share
  assert np.abs(counts - expected).max() <= 1
  for i in range(len(weights)):
    np.testing.assert_array_equal(draw[source == i], np.arange(counts[-1, i]))


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=6), slots=st.integers(0, 400))
def test_the_number_drawn_is_the_number_assigned(weights, slots):
  run = segment(steps=400, batch_size=1, sources=tuple((f"s{i}", w) for i, w in enumerate(weights)))
  source, _ = assign(run, np.arange(slots))
  assert list(draws(run, slots).values()) == np.bincount(source, minlength=len(weights)).tolist()


def test_irrational_weights_are_rounded_to_a_bounded_period():
  run = segment(steps=1000, batch_size=100, sources=(("a", 2**0.5), ("b", 3**0.5)))
  share = 2**0.5 / (2**0.5 + 3**0.5)
  assert draws(run, run.slots)["a"] == pytest.approx(run.slots * share, rel=1e-4)


def test_cursors_are_prefix_sums_and_a_new_source_starts_at_zero():
  run = (segment(3, 4), segment(5, 10, (("a", 1), ("b", 4))), segment(2, 8, (("b", 1), ("c", 1))))
  assert cursors(run, 0) == {"a": 0}
  assert cursors(run, 1) == {"a": 12, "b": 0}
  assert cursors(run, 2) == {"a": 12 + 10, "b": 40, "c": 0}
  assert [slots_before(run, i) for i in range(3)] == [0, 12, 62]


def test_a_step_knows_its_segment():
  run = (segment(3), segment(5))
  assert [segment_at(run, step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (1, 4)]
  for step in (-1, 8):
    with pytest.raises(IndexError, match="run of 8 steps"):
      segment_at(run, step)


@pytest.mark.parametrize("step", [0, 2, 3, 5, 8, 100])
def test_truncated_segments_draw_the_same_prefix(step):
  run = (segment(3), segment(5, 6, (("a", 1), ("b", 2))))
  kept = truncate(run, step)
  assert total_steps(kept) == min(step, 8)
  for k in range(total_steps(kept)):
    (i, offset), (j, other) = segment_at(run, k), segment_at(kept, k)
    assert (i, offset) == (j, other)
    assert run[i].sources == kept[j].sources


def test_segments_survive_json():
  run = segment(sources=(("a", 1), ("b", 0.25)))
  assert Segment.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"steps": 0}, "steps is 0"),
    ({"batch_size": -7}, "batch_size is -7"),
    ({"sources": ()}, "sources is empty"),
    ({"sources": (("a", 0),)}, "weight of source 'a' is 0"),
    ({"sources": (("a", 1), ("a", 2))}, "names a source twice"),
    ({"modality": "imagé"}, "did you mean 'image'"),
  ],
)
def test_impossible_segments_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    Segment(**{"steps": 1, "batch_size": 1, "sources": (("a", 1),), "resolution": 32} | fields)


def test_unknown_and_missing_fields_are_named():
  with pytest.raises(UserError, match="did you mean 'batch_size'"):
    Segment.from_dict({"batch_sise": 3})
  with pytest.raises(UserError, match="lacks the field 'batch_size'"):
    Segment.from_dict({"steps": 1, "sources": [["a", 1]], "resolution": 32})
