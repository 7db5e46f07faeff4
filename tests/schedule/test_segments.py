"""Segments: every prefix of a mixture is fair, and cursors are sums over what came before."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.interleaving import assign, draws
from contrastive_jax.schedule.segments import (
  Clips,
  Rows,
  Segment,
  ahead,
  cursors,
  draws_until,
  pairs_before,
  resume,
  segment_at,
  total_steps,
  truncate,
)
from data import mixture


def segment(steps=10, batch_size=8, sources=(("a", 1),), resolution=32):
  return Segment(steps, batch_size, sources, resolution)


@pytest.mark.parametrize(
  "weights", [(1,), (1, 1), (0.7, 0.3), (5, 1, 1), (0.333, 0.667), (1, 2, 3, 4, 5), (1e-3, 1.0), (0.1,) * 10]
)
def test_every_prefix_holds_each_source_within_one_sample_of_its_share(weights):
  run = segment(steps=300, batch_size=7, sources=tuple((f"s{i}", w) for i, w in enumerate(weights)))
  source, draw = assign(run.sources, np.arange(run.pairs))
  share = np.asarray(weights) / np.sum(weights)
  counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
  expected = np.arange(1, run.pairs + 1)[:, None] * share
  assert np.abs(counts - expected).max() <= 1
  for i in range(len(weights)):
    np.testing.assert_array_equal(draw[source == i], np.arange(counts[-1, i]))


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=6), places=st.integers(0, 400))
def test_the_number_drawn_is_the_number_assigned(weights, places):
  run = segment(steps=400, batch_size=1, sources=tuple((f"s{i}", w) for i, w in enumerate(weights)))
  source, _ = assign(run.sources, np.arange(places))
  assert list(draws(run.sources, places).values()) == np.bincount(source, minlength=len(weights)).tolist()


def test_irrational_weights_are_rounded_to_a_bounded_period():
  run = segment(steps=1000, batch_size=100, sources=(("a", 2**0.5), ("b", 3**0.5)))
  share = 2**0.5 / (2**0.5 + 3**0.5)
  assert draws(run.sources, run.pairs)["a"] == pytest.approx(run.pairs * share, rel=1e-4)


def test_cursors_are_prefix_sums_and_a_new_source_starts_at_zero():
  run = (segment(3, 4), segment(5, 10, (("a", 1), ("b", 4))), segment(2, 8, (("b", 1), ("c", 1))))
  assert cursors(run, 0) == {"a": 0}
  assert cursors(run, 1) == {"a": 12, "b": 0}
  assert cursors(run, 2) == {"a": 12 + 10, "b": 40, "c": 0}
  assert [pairs_before(run, i) for i in range(3)] == [0, 12, 62]


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
    ({"rows": Rows(4, 64)}, "pack_pairs=0 must be at least 1"),
    ({"pack_pairs": 3}, "batch_size=1 is not a multiple of data.pack_pairs=3"),
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


def with_clips(share, steps=40, seed=0):
  clips = Clips((("v", 1), ("w", 2)), share, Resolution.fixed(16), frames=4, seed=seed)
  return Segment(steps, 6, (("a", 1),), Resolution("native", max_tokens=64), "turns", clips=clips)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.3, 1.0, 0.01])
def test_every_round_has_its_share_of_clips(share):
  run = with_clips(share, steps=400)
  modalities = [run.modality_at(step) for step in range(400)]
  shown = np.array([modality == "clip" for modality, _ in modalities])
  length = run.clips.share_of_round.denominator
  np.testing.assert_array_equal(shown.reshape(-1, length).sum(axis=1), round(share * length))
  for modality in ("image", "clip"):
    earlier = [count for m, count in modalities if m == modality]
    assert earlier == list(range(len(earlier)))


def test_the_order_of_modalities_depends_on_round_and_seed():
  shown = [[with_clips(0.5, seed=seed).modality_at(step)[0] for step in range(40)] for seed in (0, 0, 1)]
  assert shown[0] == shown[1] != shown[2]
  assert len({tuple(shown[0][i : i + 2]) for i in range(0, 40, 2)}) == 2


def test_cursors_count_what_each_modality_drew():
  run = (with_clips(0.25, steps=10), with_clips(0.5, steps=4))
  clips = sum(run[0].modality_at(step)[0] == "clip" for step in range(10))
  assert cursors(run, 1) == {"a": (10 - clips) * 6, "v": clips * 2, "w": clips * 4}


def test_segments_with_clips_survive_json():
  run = with_clips(0.25)
  assert Segment.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_segments_of_before_there_were_stages_are_understood():
  old = {"steps": 3, "batch_size": 4, "sources": [["a", 1]], "resolution": 32, "modality": "image"}
  assert Segment.from_dict(old) == segment(3, 4)


def test_what_is_left_of_a_run():
  run = (segment(3), segment(5))
  assert [total_steps(ahead(run, step)) for step in range(9)] == list(range(8, -1, -1))
  assert ahead(run, 4) == (segment(4),)


def test_a_run_goes_on_with_its_own_segments_unless_the_plan_for_the_rest_changed():
  plan = (segment(3), segment(5, 6))
  assert resume((), plan, 0) == plan
  assert resume(plan, plan, 4) == plan
  longer = (segment(3), segment(9, 6))
  assert resume(plan, longer, 4) == longer
  other = (segment(3), segment(5, 6, (("b", 1),)))
  changed = resume(plan, other, 4)
  assert changed == (segment(3), segment(1, 6), segment(4, 6, (("b", 1),)))
  # Going on with the changed run, once and again.
  assert resume(changed, other, 6) == changed
  assert resume(changed, other, 8) == changed
  assert resume(plan, plan, 4, changed=True) == (segment(3), segment(1, 6), segment(4, 6))


def test_what_was_drawn_until_a_step_is_counted_one_by_one():
  clips = Clips((("v", 1), ("w", 2)), 0.3, Resolution.fixed(8), frames=4, seed=0)
  run = (
    Segment(10, 6, (("a", 1), ("b", 2)), 8, clips=clips),
    Segment(7, 8, (("b", 1),), 8, captions_per_image=4),
  )
  lengths = {"a": 5, "b": 7, "v": 3, "w": 11}
  counted = dict.fromkeys(("a", "b", "v", "w"), 0)
  for step in range(17):
    drawn = mixture.drawn(run, lengths, 0, step, slice(0, run[0].batch_size if step < 10 else run[1].batch_size))
    for source, copy in zip(drawn.source, drawn.copy, strict=True):
      counted[drawn.names[source]] += copy == 0
    found = draws_until(run, step + 1)
    assert found == {name: count for name, count in counted.items() if name in found}
    assert sum(found.values()) == sum(counted.values())
