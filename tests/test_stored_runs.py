"""Runs that an older version began go on as that version went on.

`stored/adamw.tar.xz` and `stored/lion.tar.xz` hold runs of `stored/config.py` as commit 5855b71 left them: a checkpoint
of step 8, without checksums of logs and without plans or a config in the checkpoint. `final.npz` holds the parameters
and their average that this commit reached after 16 steps.
"""

import json
import shutil

import numpy as np
import pytest

from contrastive_jax.runs import read_json_lines
from tests import runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_run_of_an_older_version_goes_on(optimizer, tmp_path):
  shutil.unpack_archive(runs.ROOT / "tests" / "stored" / f"{optimizer}.tar.xz", tmp_path)
  before = [json.loads(line) for line in (tmp_path / "sample_ids.jsonl").read_text().splitlines()]
  assert len(before) == 16
  output = runs.run("train.py", f"--config=tests/stored/config.py:{optimizer}", f"--workdir={tmp_path}")
  assert "from step 8 to step 16" in output and "left out" not in output
  assert read_json_lines(tmp_path / "sample_ids.jsonl") == before
  # Bits depend on the processor; on the one that the runs were made on they are equal.
  expected, found = dict(np.load(tmp_path / "final.npz")), runs.final_state(tmp_path)
  assert len(expected) > 60
  runs.assert_close({name: found[name] for name in expected}, expected, 1e-5)
