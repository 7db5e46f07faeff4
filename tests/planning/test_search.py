"""The search for the largest batch, against a device whose memory is a formula."""

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.planning import topologies
from contrastive_jax.planning.search import GRANULARITY, find_max_batch


def device(limit):
  """Fits batches of up to `limit` pairs."""
  return lambda size: {"batch_size": size, "memory": {"fits": size <= limit, "peak_bytes": float(size)}}


@pytest.mark.parametrize("unit", [1, 8, 256])
@pytest.mark.parametrize("start", [1, 256, 5000, 10**6])
@pytest.mark.parametrize("limit", [256, 300, 4096, 5119, 99_999])
def test_it_comes_close_from_below(unit, start, limit):
  plan, tried = find_max_batch(device(limit), unit, start)
  best = plan["batch_size"]
  assert best <= limit and best % unit == 0
  assert best + max(unit, best * GRANULARITY + unit) > limit
  assert len({row["batch_size"] for row in tried}) == len(tried) < 40
  assert max(row["batch_size"] for row in tried if row["fits"]) == best


def test_nothing_fits():
  with pytest.raises(UserError, match="batch_size=8, the smallest"):
    find_max_batch(device(7), 8, 1024)


@pytest.mark.parametrize(
  ("name", "group", "expected"),
  [
    ("h100:8", [0, 7], 450e9),
    ("h100:2x8", list(range(8)), 450e9),
    # One GPU of each host: one card each. All of both hosts: eight cards a host, NVLink's pace at most.
    ("h100:2x8", [0, 8], 50e9),
    ("h100:2x8", list(range(16)), 400e9),
    ("v5e:4x4", list(range(16)), 200e9),
  ],
)
def test_links(name, group, expected):
  assert topologies.find(name).link(group) == expected
