"""A few places of the sweeps that `benchmarks.bit_flips` and `benchmarks.disk_full` make in full."""

import os
import subprocess
import sys

import pytest

from tests import runs

pytestmark = pytest.mark.slow


def test_no_flipped_bit_differs_in_silence(tmp_path):
  runs.train(tmp_path / "run", "--config.total_steps=16")
  command = [
    sys.executable,
    "-m",
    "benchmarks.bit_flips",
    f"--workdir={tmp_path / 'run'}",
    "--places=1",
    "--commands=1",
  ]
  done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=600, check=False)
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
  if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("mounting a small disk is not permitted here")
  subprocess.run(["umount", str(tmp_path)], check=True)
  command = [sys.executable, "-m", "benchmarks.disk_full", "--moments=1"]
  done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=600, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
