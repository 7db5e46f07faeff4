"""The search for the largest batch, against a device whose memory is a formula."""

import jax
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.planning import topologies
from contrastive_jax.planning.search import (
  GRANULARITY,
  REMATS,
  batch_to_search,
  find_max_batch,
  find_remat,
  with_remat,
)
from contrastive_jax.schedule.stages import segments_of
from contrastive_jax.training.run import Run
from tests import tiny, tiny_stages


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


def staged(*batch_sizes):
  """Packs of 8 pairs, and stages that set their own batch, or 0 for that of the run."""
  config = tiny_stages.get_config()
  config.objective = {"sigmoid": 1.0}
  config.batch_size = 64
  for stage, batch_size in zip(config.curriculum, batch_sizes, strict=True):
    stage.batch_size = batch_size
  return config


@pytest.mark.parametrize(
  ("batch_sizes", "stage", "start"),
  [
    ((0, 0, 0), None, 64),
    ((0, 0, 0), "native", 64),
    ((0, 32, 128), "native", 32),
    ((0, 32, 128), "fixed", 64),
    ((0, 32, 128), "video/clip", 128),
  ],
)
def test_the_batch_of_a_packed_stage_is_searched(batch_sizes, stage, start):
  config = staged(*batch_sizes)
  config.accumulation = 2
  unit, begin, with_batch = batch_to_search(config, stage, 2)
  assert (unit, begin) == (2 * 2 * 8, start)
  before, after = ([segment.batch_size for segment in segments_of(each)] for each in (config, with_batch(96)))
  changed = {each.name for each, old, new in zip(config.curriculum, before, after, strict=True) if old != new}
  # Stages that share the batch of the run change together, and one with a batch of its own alone.
  own = {each.name for each in config.curriculum if each.batch_size}
  assert changed == ({stage.partition("/")[0]} if start != 64 else {"fixed", "native", "video"} - own)
  assert find_max_batch(device(200), unit, begin)[0]["batch_size"] == 192


def test_the_smallest_batch_that_is_tried_can_be_trained():
  config = staged(0, 0, 0)
  mesh = MeshSpec(data=2).make(jax.devices()[:2])
  unit, _, with_batch = batch_to_search(config, None, 2)
  Run.from_config(with_batch(unit)).build(mesh)
  with pytest.raises(UserError, match="batch_size=8 does not divide over 2 devices in packs"):
    Run.from_config(with_batch(unit // 2)).build(mesh)


@pytest.mark.parametrize("batch_sizes", [(32, 32, 32), (0, 32, 0)])
def test_a_stage_with_a_batch_of_its_own_has_to_be_named(batch_sizes):
  config, first = staged(*batch_sizes), 0 if batch_sizes[0] else 1
  with pytest.raises(UserError, match=rf"curriculum\.{first}\.batch_size=32: name the stage to search with --stage"):
    batch_to_search(config, None, 2)
  with pytest.raises(UserError, match=r"--stage='nativ' is unknown.*did you mean 'native'"):
    batch_to_search(config, "nativ", 2)


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


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 9])
def test_the_fastest_way_that_fits_is_found(limit):
  """Keeping more is faster, without a loop faster still, and takes twice the memory."""
  made = []

  def attempt(remat, looped):
    kept = 1 + REMATS.index(remat)
    fits = kept * (1 if looped else 2) <= limit
    made.append((remat, looped))
    plan = {"way": (remat, looped), "compile_seconds": 1.0, "memory": {"fits": fits, "peak_bytes": float(kept)}}
    return {**plan, "time": {"step_seconds": 10.0 - kept - (not looped) / 2}} if fits else plan

  plan, tried = find_remat(attempt)
  expected = [(remat, True) for remat in REMATS[:limit]] + [(remat, False) for remat in REMATS[: limit // 2]]
  assert [(row["remat"], row["looped"]) for row in tried if row["fits"]] == expected
  assert made == [(row["remat"], row["looped"]) for row in tried] and len(made) <= len(expected) + 2
  assert plan["way"] == max(expected, key=lambda way: (REMATS.index(way[0]), not way[1]))


def test_no_way_to_run_the_blocks_fits():
  misfit = {"memory": {"fits": False, "peak_bytes": 1.0}, "compile_seconds": 1.0}
  with pytest.raises(UserError, match="whatever is computed again"):
    find_remat(lambda remat, looped: misfit)


def test_a_way_to_run_the_blocks_is_set_in_both_towers():
  config = tiny.get_config()
  blocks = Run.from_config(with_remat(config, "mlp+mix", looped=False)).model
  for tower in (blocks.image.transformer, blocks.text.transformer):
    assert (tower.remat, tower.unroll) == ("mlp+mix", tower.depth)
  assert Run.from_config(with_remat(config, "none", looped=True)).model.image.transformer.unroll == 1
