"""The benchmark of the data side measures what it says, at sizes at which it is quick."""

import sys

import numpy as np
import pytest

from benchmarks import large_index, photographs, turns
from data.sources.indexed import IndexedSource


def test_a_crop_lies_within_the_picture_and_has_the_asked_share_of_it():
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(200):
    height, width = rng.integers(200, 600, 2)
    found = photographs.crop(height, width, rng.random(5))
    assert 0 <= found.top <= height - found.height and 0 <= found.left <= width - found.width
    shares.append(found.height * found.width / min(height, width) ** 2)
  # Of the largest square, between half and all; the stretch changes no area, but sides are whole and cut off.
  assert 0.48 < min(shares) < 0.6 and 0.9 < max(shares) <= 1.15


@pytest.mark.slow
def test_all_samples_of_the_large_index_can_be_read(tmp_path):
  assert large_index.write(tmp_path / "large", 1000) > 1000 * 100
  source = IndexedSource("webdataset", f"{tmp_path}/large/all.tar", filter=large_index.FILTER)
  assert 400 < len(source) < 600
  example = source[len(source) - 1]
  assert example.image.shape == (16, 16, 3) and len(example.text.captions) == 1
  found = large_index.samples(tmp_path / "large", 5120)
  assert [each["what"] for each in found][-1] == "5,120 samples" and found[-1]["all"] > found[-1]["own"] > 0


@pytest.mark.slow
def test_contestants_take_turns_and_one_that_cannot_start_says_why():
  program = "from benchmarks import turns; turns.serve(lambda n: (print('more'), sum(range(10**6)), 7 * n)[2])"
  works = turns.Contestant("works", [sys.executable, "-c", program], 0)
  assert not works.failure
  done = works.turn(3)
  works.close()
  assert done.items == 21 and 0 < done.processor < 5
  broken = turns.Contestant("broken", [sys.executable, "-c", "import no_such_package"], 0)
  broken.close()
  assert "no_such_package" in broken.failure
