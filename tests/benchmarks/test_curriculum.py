"""The comparisons give both sides the same, and print what was measured."""

import numpy as np
import pytest

from benchmarks import curriculum
from contrastive_jax.schedule.stages import segments_of
from contrastive_jax.training.run import Run


@pytest.mark.parametrize("variant", ["captions", "squeezed", "native", "none", "learned", "rotary"])
def test_every_variant_is_a_config_that_runs(variant):
  Run.from_config(curriculum.get_config(variant))


def test_squeezed_and_native_see_as_many_tokens():
  tokens = {}
  for variant in ("squeezed", "native"):
    config = curriculum.get_config(variant)
    (segment,) = segments_of(config)
    if variant == "native":
      pairs = config.data.pack_pairs
      tokens[variant] = segment.steps * segment.rows.count * segment.rows.length / pairs
    else:
      tokens[variant] = segment.steps * (segment.resolution.size // config.model.image.patch_size) ** 2
  assert tokens["squeezed"] == pytest.approx(tokens["native"], rel=0.01)


def test_the_table_shows_means_and_each_seeds_difference():
  comparison = curriculum.Comparison(("a", "b"), (("set", "acc1"),))
  scores = np.array([[[10.0], [20.0]], [[13.0], [19.0]]])
  assert curriculum.table(comparison, scores).splitlines()[2:] == ["| a | 15.0% |", "| b | 16.0% (+3.0, -1.0) |"]
