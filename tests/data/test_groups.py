"""Group labels against a plain search over the pairs."""

import numpy as np
import pytest

from data.groups import group_labels


def connected(keys):
  """The plain answer: grow each pair's component until nothing joins."""
  labels = list(range(len(keys)))
  for _ in keys:
    for i, a in enumerate(keys):
      for j, b in enumerate(keys):
        if a[0] == b[0] or a[1] == b[1]:
          labels[i] = labels[j] = min(labels[i], labels[j])
  return labels


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_the_connected_components(seed):
  rng = np.random.default_rng(seed)
  keys = rng.integers(0, 12, (20, 2))
  clean = np.zeros(20, bool)
  assert group_labels(keys, slice(0, 20), keys, clean).tolist() == connected(keys.tolist())


def test_a_chain_is_one_group():
  keys = np.array([[0, 0], [1, 0], [1, 1], [2, 1], [9, 9]])
  assert group_labels(keys, slice(0, 5), keys, np.zeros(5, bool)).tolist() == [0, 0, 0, 0, 4]


def test_every_host_gives_its_rows_the_global_labels():
  keys = np.random.default_rng(0).integers(0, 12, (24, 2))
  whole = group_labels(keys, slice(0, 24), keys, np.zeros(24, bool))
  parts = [group_labels(keys, slice(k, k + 6), keys[k : k + 6], np.zeros(6, bool)) for k in range(0, 24, 6)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_substitute_joins_what_it_equals_and_nothing_else():
  planned = np.array([[1, 1], [2, 2], [3, 3], [4, 4]])
  actual = np.array([[1, 1], [1, 7], [8, 9], [4, 4]])
  labels = group_labels(planned, slice(0, 4), actual, np.array([False, True, True, False]))
  assert labels[:2].tolist() == [0, 0] and labels[3] == 3
  assert labels[2] >= 4
