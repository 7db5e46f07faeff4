"""The rates of rows, whenever the loop learns that a step has ended."""

import itertools
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import Batch, TextBatch
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.training import loop
from tests.keys import keys_of

BATCH = Batch(
  patchify(np.zeros((8, 4, 4, 3), np.uint8), 4),
  TextBatch(np.zeros((8, 2), np.int32), np.ones((8, 2), bool)),
  keys_of(np.arange(8)),
)
NAP = 0.002


@pytest.mark.parametrize("log_every", [1, 2])
@pytest.mark.parametrize("seen", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_window_takes_time_and_all_of_them_what_has_passed(seen, log_every, tmp_path, monkeypatch):
  """Time once went backwards where a step still ran when it had been dispatched and the next one had ended."""
  rows, number, mesh = [], itertools.count(), MeshSpec().make(jax.devices()[:1])
  pipeline = types.SimpleNamespace(iterate=lambda start, stop: ((step, BATCH) for step in range(start, stop)))
  writer = types.SimpleNamespace(write=rows.append)
  options = loop.LoopOptions(total_steps=len(seen), log_every=log_every)
  monkeypatch.setattr(loop, "_have_ended", lambda metrics: seen[next(number)])
  metrics = {name: jnp.ones(()) for name in ("loss", "grad_norm", "finite")}
  began = time.perf_counter()
  steps = loop._Steps(tmp_path, pipeline, None, writer, options, mesh, 0, lambda: None)
  for index, _ in steps.batches():
    time.sleep(NAP)
    steps.finish(index + 1, metrics)
  steps.settle()
  passed = time.perf_counter() - began
  assert all(row["step_seconds"] > 0 and row["images_per_second"] > 0 for row in rows)
  assert all(0 <= row["data_wait_fraction"] <= 1 for row in rows)
  ends = [0, *(row["step"] for row in rows)]
  counts = [end - start for start, end in itertools.pairwise(ends)]
  total = sum(count * row["step_seconds"] for count, row in zip(counts, rows, strict=True))
  assert NAP * (len(seen) - 1) <= total <= passed
