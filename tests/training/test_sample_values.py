"""What terms keep of samples comes to every host: of those that were seen, evenly spread over all rows."""

import dataclasses

import jax
import numpy as np

from contrastive_jax.objectives import make_objective
from contrastive_jax.training.sample_values import sample_values
from contrastive_jax.training.state import TrainState
from tests.training.accumulating import make_spec


def test_values_are_those_of_the_samples_that_were_seen():
  options = {"matryoshka": {"of": "individual_temperatures", "dims": (4,)}}
  spec = dataclasses.replace(make_spec(8), objective=make_objective({"matryoshka": 1.0}, options))
  rows = np.arange(32, dtype=np.float32)
  side = {"log_mean": rows, "temperature": 1 + rows, "momentum": rows}
  part = {"image": side, "text": {**side, "temperature": 2 * rows}, "seen": np.arange(32, dtype=np.int32) % 3}
  split = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.NamedSharding(spec.mesh, jax.P("data"))), part)
  state = TrainState(0, {}, {}, objective={"matryoshka": {"whole": split, "first_4": split}})
  found = sample_values(spec, state, most=16)
  seen = [row for row in range(0, 32, 2) if row % 3]
  np.testing.assert_array_equal(found["Temperatures of images"], [1 + row for row in seen])
  np.testing.assert_array_equal(found["Temperatures of texts"], [2 * row for row in seen])
  assert sample_values(make_spec(8), TrainState(0, {}, {})) == {}
