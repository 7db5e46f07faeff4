"""A batch is a function of segments, seed and step: of nothing else."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import ToySource, WordTokenizer

from contrastive_jax import bad_records
from contrastive_jax.errors import UserError
from contrastive_jax.schedule.segments import Segment, truncate
from data import chunks
from data.augment import DRAWINGS
from data.pipeline import Pipeline
from data.sources import Source
from tests import runs

SEGMENTS = (
  Segment(4, 24, (("a", 2), ("b", 1)), 16),
  Segment(3, 12, (("b", 1), ("c", 1)), 8),
)


def sources(**bad):
  return {name: ToySource(name, length, bad=bad.get(name, ())) for name, length in (("a", 50), ("b", 30), ("c", 7))}


def make(segments=SEGMENTS, data=None, **options):
  options = {"text_length": 24, "patch_size": 4, "seed": 3, "augment": DRAWINGS, "threads": 0} | options
  return Pipeline(segments, data or sources(), WordTokenizer(), **options)


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_toy_sources_follow_the_protocol():
  assert isinstance(ToySource("a", 1), Source)


def test_shapes_and_types():
  batch = make().batch(0)
  assert batch.image.patches.shape == (24, 16, 48) and batch.image.patches.dtype == np.uint8
  assert batch.image.coords.shape == (24, 16, 3) and batch.image.coords.dtype == np.int16
  assert batch.text.tokens.shape == batch.text.mask.shape == (24, 24)
  assert batch.keys.shape == (24, 2, 2) and batch.keys.dtype == np.uint32 and batch.ids.dtype == np.int64
  assert make().batch(5).image.patches.shape == (12, 4, 48)


def test_asking_again_or_in_another_order_gives_the_same():
  first, second = make(), make()
  forward = [first.batch(step) for step in range(7)]
  backward = [second.batch(step) for step in reversed(range(7))][::-1]
  assert_same(forward, backward)


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_hosts_share_the_batch_of_one_host(hosts):
  whole = make()
  parts = [make(host_index=host, host_count=hosts) for host in range(hosts)]
  for step in (0, 3, 4, 6):
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch(step) for part in parts))
    assert_same(together, whole.batch(step))


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 3}, {"threads": 3, "prefetch_bytes": 1}])
def test_iterating_from_anywhere_gives_the_batches(options, monkeypatch):
  monkeypatch.setattr(chunks, "CHUNK_ROWS", 6)
  run = make(**options)
  for start, stop in ((0, 7), (2, 6), (5, 5)):
    items = list(run.iterate(start, stop))
    assert [step for step, _ in items] == list(range(start, stop))
    for step, batch in items:
      assert_same(batch, make().batch(step))


def test_worker_processes_give_the_same_batches():
  items = list(make(workers=2, threads=1).iterate(1, 4))
  assert_same([batch for _, batch in items], [make().batch(step) for step in range(1, 4)])


def test_a_batch_of_workers_that_is_held_to_the_end_of_python_is_no_leak():
  program = (
    "import test_pipeline\n"
    "if __name__ == '__main__':\n"
    "  *_, (_, batch) = test_pipeline.make(workers=1, threads=1).iterate(0, 2)\n"
    "  assert batch.ids.shm.name\n"
    "  held = [batch]\n"
    "  held.append(held)\n"
    "  del batch, held\n"
  )
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(runs.ROOT), str(Path(__file__).parent)])}
  ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
  assert (ended.returncode, ended.stderr) == (0, "")


def test_leaving_an_iteration_early_is_clean():
  run = make(threads=2)
  for step, _ in run.iterate(0, 7):
    if step == 1:
      break
  assert_same(next(run.iterate(2, 7))[1], make().batch(2))


def test_an_appended_segment_leaves_the_past_as_it_was():
  changed = (*truncate(SEGMENTS, 5), Segment(4, 20, (("d", 1), ("a", 1)), 16))
  data = sources() | {"d": ToySource("d", 9)}
  before, after = make(), make(changed, data)
  assert_same([before.batch(step) for step in range(5)], [after.batch(step) for step in range(5)])
  # Source a goes on where it was: its first 64 draws, 4 * 16 of them past, are one epoch of 50 and a bit.
  ids = [int(i) for step in range(4) for i in before.batch(step).ids if i < 2**40]
  more = [int(i) for step in range(5, 9) for i in after.batch(step).ids if i < 2**40]
  stream = ids + more
  assert sorted(stream[:50]) == sorted(stream[50:100]) == list(range(50))


def test_captions_and_views_differ_by_seed_and_by_step():
  run = make(segments=(Segment(8, 50, (("a", 1),), 16),))
  other = make(segments=(Segment(8, 50, (("a", 1),), 16),), seed=4)
  first, second = run.batch(0), run.batch(1)  # Two epochs of source a.
  rows = {int(i): k for k, i in enumerate(second.ids)}
  order = [rows[int(i)] for i in first.ids]
  same_caption = (first.text.tokens == second.text.tokens[order]).all(axis=1).mean()
  assert 0.2 < same_caption < 0.8
  assert (first.image.patches != second.image.patches[order]).any(axis=(1, 2)).mean() > 0.9
  assert not np.array_equal(first.ids, other.batch(0).ids)


def test_without_augmentation_the_picture_is_the_record():
  batch = make(segments=(Segment(1, 4, (("a", 1),), 12),), patch_size=12, augment=None).batch(0)
  for pixels, sample in zip(batch.image.patches, batch.ids, strict=True):
    image = pixels.reshape(12, 12, 3)
    assert (image[:, 6:] == sample).all() and (image[:, :6] == sample // 2).all()


def test_pairs_share_a_key_where_they_share_a_group_or_a_caption():
  captions = [("shared",), ("shared",), ("own",), ("other",)]
  groups = [1, 2**63 + 2, -(2**63) + 2, 1 + 2**32]
  data = {"a": ToySource("a", 4, captions=captions, groups=groups)}
  for hosts in (1, 2):
    parts = [
      make((Segment(2, 4, (("a", 1),), 8),), data, host_index=h, host_count=hosts).batch(1) for h in range(hosts)
    ]
    order = np.argsort(np.concatenate([part.ids for part in parts]))
    keys = np.concatenate([part.keys for part in parts])[order]
    same = (keys[:, None] == keys).all(axis=-1)
    # A group is a number of 64 bits, with a sign or without.
    np.testing.assert_array_equal(np.argwhere(np.triu(same[..., 0], 1)), [[1, 2]])
    np.testing.assert_array_equal(np.argwhere(np.triu(same[..., 1], 1)), [[0, 1]])


def test_keys_are_the_same_in_every_release():
  data = {"a": ToySource("a", 1, captions=[("a red dog",)], groups=[0x0123456789ABCDEF])}
  keys = make((Segment(1, 1, (("a", 1),), 8),), data).batch(0).keys
  digest = hashlib.blake2b(b"('a red dog',)", digest_size=8).digest()
  number = int.from_bytes(digest, "little") >> 1
  assert keys.tolist() == [[[0x89ABCDEF, 0x01234567], [number % 2**32, number >> 32]]]


def test_a_host_reads_its_own_records_and_no_others():
  """It does so too where a record of its own, or of another, is bad."""

  class Counting(ToySource):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options)
      self.read = []

    def __getitem__(self, index):
      self.read.append(index)
      return super().__getitem__(index)

  for bad in ((), (3, 4, 20)):
    for host in range(3):
      data = {"a": Counting("a", 50, bad=bad)}
      batch = make((Segment(2, 24, (("a", 1),), 8),), data, host_index=host, host_count=3).batch(1)
      read = data["a"].read
      assert len(batch.ids) == 8 and [i for i in read if i not in bad] == batch.ids.tolist()
      # What is left are the bad ones that were drawn; texts were read with the images alone.
      assert len(read) - 8 <= len(bad) and data["a"].text_reads == 8


def test_a_substitute_has_its_own_keys():
  data, clean = {"a": ToySource("a", 10, bad=(3,))}, {"a": ToySource("a", 10)}
  with_bad, without = (make((Segment(1, 10, (("a", 1),), 8),), each).batch(0) for each in (data, clean))
  where = np.flatnonzero(without.ids == 3)[0]
  there = np.flatnonzero(without.ids == 4)[0]
  np.testing.assert_array_equal(with_bad.keys[where, 0], without.keys[there, 0])
  rest = np.arange(10) != where
  np.testing.assert_array_equal(with_bad.keys[rest], without.keys[rest])


def test_a_bad_record_is_replaced_and_counted_the_same_everywhere():
  data = sources(a=(3, 4, 20))
  whole = make(data=data)
  batches = [whole.batch(step) for step in range(7)]
  drawn = sum(1 for step in range(4) for i in make().batch(step).ids if int(i) in (3, 4, 20))
  assert whole.substituted == drawn > 0
  assert not {3, 4, 20} & {int(i) for batch in batches for i in batch.ids}
  threaded = make(data=sources(a=(3, 4, 20)), threads=2)
  assert_same([batch for _, batch in threaded.iterate(0, 7)], batches)
  assert threaded.substituted == drawn
  parts = [make(data=sources(a=(3, 4, 20)), host_index=host, host_count=2) for host in range(2)]
  for step in range(4):
    assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *(p.batch(step) for p in parts)), batches[step])
  assert sum(part.substituted for part in parts) == drawn


def test_only_bad_records_stop_the_run():
  with pytest.raises(UserError, match="17 bad records in a row"):
    make(data=sources(a=range(50))).batch(0)


def test_input_output_errors_are_retried_and_then_stop_the_run(monkeypatch):
  monkeypatch.setattr(bad_records, "RETRY_DELAYS", (0, 0, 0))

  class Flaky(ToySource):
    failures = 2

    def __getitem__(self, index):
      if index == 5 and self.failures:
        self.failures -= 1
        raise TimeoutError("the disk is busy")
      return super().__getitem__(index)

  steady = make()
  flaky = make(data=sources() | {"a": Flaky("a", 50)})
  assert_same([flaky.batch(step) for step in range(4)], [steady.batch(step) for step in range(4)])
  assert flaky.substituted == 0
  broken = Flaky("a", 50)
  broken.failures = 10**9
  with pytest.raises(TimeoutError, match="busy"):
    for _ in make(data=sources() | {"a": broken}, threads=2).iterate(0, 4):
      pass


def test_prefetch_is_bounded_in_bytes():
  class Counting(ToySource):
    reads = 0

    def __getitem__(self, index):
      self.reads += 1
      return super().__getitem__(index)

  segments = (Segment(500, 16, (("a", 1),), 16),)
  batch_bytes = 16 * (16 * 16 * 3 + 24 * 5)
  data = {"a": Counting("a", 50)}
  iterator = make(segments, data, threads=2, prefetch_bytes=4 * batch_bytes).iterate(0, 500)
  next(iterator)
  import time

  time.sleep(0.3)
  assert data["a"].reads <= (1 + 4 + 1) * 16
  iterator.close()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"segments": ()}, "no segments"),
    ({"segments": (Segment(1, 8, (("aa", 1),), 16),)}, "unknown data source 'aa' \\(did you mean 'a'\\?\\)"),
    ({"host_count": 5}, "batch_size=24 must be a multiple of the 5 hosts"),
    ({"host_index": 2, "host_count": 2}, "host_index is 2"),
    ({"patch_size": 17}, "size=16 is less than model.image.patch_size=17"),
    ({"threads": -1}, "threads is -1"),
    ({"data": {"a": ToySource("a", 0), "b": ToySource("b", 1), "c": ToySource("c", 1)}}, "'a' is empty"),
  ],
)
def test_impossible_pipelines_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    make(**options)


def test_steps_outside_of_the_run_are_refused():
  with pytest.raises(IndexError):
    make().batch(7)
  assert len(make()) == 7


def test_batches_are_pytrees_without_ids_on_the_device():
  assert make().batch(0).on_device().ids is None
  assert {f.name for f in dataclasses.fields(make().batch(0))} >= {"image", "text", "ids"}
