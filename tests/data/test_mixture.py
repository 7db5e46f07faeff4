"""Draws and permutations are functions of their arguments, fair, and the same however they are asked for."""

import numpy as np
import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.schedule.interleaving import assign
from contrastive_jax.schedule.segments import Segment
from data.mixture import drawn, permuted, shuffled, uniforms


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 1000, 4097])
def test_a_permutation_is_a_bijection(length):
  for key in range(4):
    image = permuted(np.arange(length), length, key)
    np.testing.assert_array_equal(np.sort(image), np.arange(length))


def test_a_permutation_is_the_same_asked_one_by_one():
  together = permuted(np.arange(100), 100, "k")
  assert [int(permuted(np.array([i]), 100, "k")[0]) for i in range(100)] == together.tolist()


def test_permutations_look_random():
  length, keys = 50, 2000
  images = np.stack([permuted(np.arange(length), length, key) for key in range(keys)])
  counts = np.stack([np.bincount(images[:, i], minlength=length) for i in range(length)])
  # Each cell is binomial with mean keys / length = 40; chi-squared of 2,500 cells has a standard deviation of 71.
  chi_squared = ((counts - keys / length) ** 2 / (keys / length)).sum()
  assert abs(chi_squared - length * length) < 6 * np.sqrt(2 * length * length)
  steps = np.abs(np.diff(images, axis=1)).mean()
  assert steps == pytest.approx(length / 3, rel=0.02)  # The mean distance of two random positions.


def test_every_epoch_is_another_permutation():
  epochs = shuffled(np.arange(3 * 40), 40, seed=0, name="a").reshape(3, 40)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(epochs[0], shuffled(np.arange(40), 40, seed=0, name="b"))
  assert not np.array_equal(epochs[0], shuffled(np.arange(40), 40, seed=1, name="a"))


def test_draws_of_a_position_do_not_depend_on_its_neighbours():
  together = uniforms(7, "augment", 1000, 50, 28)
  for k in (0, 1, 49):
    np.testing.assert_array_equal(uniforms(7, "augment", 1000 + k, 1, 28)[0], together[k])
  assert together.min() >= 0 and together.max() < 1
  assert together.mean() == pytest.approx(0.5, abs=0.03)


def test_draws_differ_by_seed_and_purpose():
  rows = [uniforms(seed, what, 0, 1, 4) for seed in (0, 1) for what in ("caption", "augment")]
  assert len({row.tobytes() for row in rows}) == 4


def test_rows_of_a_batch_are_drawn_alike_whole_or_in_parts():
  run = (Segment(3, 12, (("a", 1), ("b", 2)), 16), Segment(5, 8, (("b", 1), ("c", 1)), 16))
  lengths = {"a": 5, "b": 7, "c": 3}
  for step in range(8):
    size = run[step // 3 if step < 3 else 1].batch_size
    whole = drawn(run, lengths, 0, step, slice(0, size))
    parts = [drawn(run, lengths, 0, step, slice(k, k + 4)) for k in range(0, size, 4)]
    np.testing.assert_array_equal(np.concatenate([p.index for p in parts]), whole.index)
    assert [p.position for p in parts] == [whole.position + k for k in range(0, size, 4)]


def test_every_source_is_read_epoch_by_epoch_across_segments():
  run = (Segment(3, 12, (("a", 1), ("b", 2)), 16), Segment(6, 8, (("b", 1), ("c", 1)), 16))
  lengths = {"a": 5, "b": 7, "c": 3}
  seen = {"a": [], "b": [], "c": []}
  for step in range(9):
    plan = drawn(run, lengths, 0, step, slice(0, 12 if step < 3 else 8))
    for source, index in zip(plan.source, plan.index, strict=True):
      seen[plan.names[source]].append(int(index))
  assert [len(indices) for indices in seen.values()] == [12, 24 + 24, 24]
  for name, indices in seen.items():
    for start in range(0, len(indices) - lengths[name], lengths[name]):
      assert sorted(indices[start : start + lengths[name]]) == list(range(lengths[name]))


def test_tempered_weights_draw_samples_equally_or_sources_equally():
  samples = {"a": 9000, "b": 900, "c": 100}
  for temperature in (1, 2, 1e9):
    weights = common.tempered(samples, temperature)
    source, _ = assign(tuple(weights.items()), np.arange(100_000))
    shares = np.array(list(samples.values())) ** (1 / temperature)
    np.testing.assert_allclose(np.bincount(source) / 100_000, shares / shares.sum(), atol=1e-3)
  for bad in ({"a": 0}, {"a": -1}):
    with pytest.raises(UserError):
      common.tempered(bad, 1)
  with pytest.raises(UserError):
    common.tempered(samples, 0)
