"""The benchmark of the train step runs what it says."""

import numpy as np
import pytest
from absl import flags

from benchmarks import peers, step, timing
from contrastive_jax.errors import UserError


@pytest.fixture
def small():
  flags.FLAGS(["step", "--preset=siglip_ti16", "--batch=8", "--image_size=32", "--text_length=4", "--text_depth=2"])
  yield step.problem()
  flags.FLAGS.unparse_flags()


@pytest.mark.slow
def test_ours_trains_the_towers_it_is_asked_for(small):
  contestant = step.ours("dots", 1, small)
  width, mlp, blocks = 192, 768, 12 + 2
  matrices = blocks * (4 * width**2 + 2 * width * mlp)
  tables = (32000 + 4 + 4) * width + 768 * width
  pool_and_projection = 4 * width**2 + 2 * width * mlp + width**2
  # Biases, norms and the probe are what is left.
  assert 0 < contestant.parameters - matrices - tables - pool_and_projection < 0.01 * matrices
  losses = [float(contestant.step()) for _ in range(3)]
  assert np.all(np.isfinite(losses)) and losses[-1] != losses[0]


def test_every_contestant_gets_its_turn_and_the_first_is_not_timed():
  calls = []
  times = timing.taking_turns([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
  assert calls == ["a", "b"] * 3
  assert times.shape == (2, 2, 2)


def test_a_directory_that_is_not_big_vision_is_named(small, tmp_path):
  with pytest.raises(UserError, match="is not a checkout"):
    peers.big_vision(str(tmp_path), small)
