"""Runs that an older version began go on as that version went on.

`stored/*.tar.xz` hold runs of `stored/config.py` as an older version left them after 8 steps, and the parameters, their
average and what the objective remembers that this version reached after 16 steps, as `final.npz`:

- adamw and lion, of commit 5855b71: without checksums of logs, and without plans or a config in the checkpoint.
- individual, of commit 9953e4f, with `loss=individual_temperatures`: the last version of configs without a number, in
  which the image tower was `vision` and the optimiser's state `slots`.
"""

import shutil

import numpy as np
import pytest

from contrastive_jax.runs import read_json_lines
from tests import runs

pytestmark = pytest.mark.slow


STORED = {
  "adamw": ("adamw",),
  "lion": ("lion",),
  "individual": ("adamw", "--config.loss=individual_temperatures"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_run_of_an_older_version_goes_on(name, tmp_path):
  shutil.unpack_archive(runs.ROOT / "tests" / "stored" / f"{name}.tar.xz", tmp_path)
  optimizer, *flags = STORED[name]
  before = read_json_lines(tmp_path / "sample_ids.jsonl")
  assert len(before) == 16
  output = runs.run("train.py", f"--config=tests/stored/config.py:{optimizer}", f"--workdir={tmp_path}", *flags)
  assert "from step 8 to step 16" in output and "left out" not in output
  assert read_json_lines(tmp_path / "sample_ids.jsonl") == before
  # Bits depend on the processor; on the one that the runs were made on they are equal.
  expected, found = dict(np.load(tmp_path / "final.npz")), runs.final_state(tmp_path)
  assert len(expected) > 60
  if name == "lion":
    # The gradient of the keys' bias is nothing but rounding, of which Lion takes the sign for a step of full size.
    for state in (expected, found):
      state.update({leaf: _without_keys(value) for leaf, value in state.items() if leaf.endswith("['qkv']['bias']")})
  # Derivatives by a temperature of 0.01 magnify the rounding of similarities a hundred times.
  tolerance = 1e-3 if name == "individual" else 1e-5
  runs.assert_close({name: found[name] for name in expected}, expected, tolerance)


def _without_keys(bias):
  """Leaves the keys out of the bias `[layers, features]`: of each head queries, keys and values stand side by side."""
  return bias.reshape(len(bias), -1, 3, 4)[:, :, ::2]
