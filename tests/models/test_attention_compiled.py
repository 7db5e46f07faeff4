"""Attention over long rows, compiled for TPUs and GPUs that are not here."""

import os
import re
import subprocess

import pytest

from tests import runs

PLAN_PYTHON = runs.ROOT / ".venv-plan" / "bin" / "python"
LINE = re.compile(r"(\d+) tokens: (\d+) kernels +([\d.]+) MiB, blocks +([\d.]+) MiB; dense logits alone +(\d+) MiB")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--head_dim=80"], ["--head_dim=64", "--dtype=float32"]])
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:4"])
def test_memory_is_linear_in_the_length(topology, options):
  if not PLAN_PYTHON.exists():
    pytest.skip("`make plan` has not been run")
  command = [str(PLAN_PYTHON), "-m", "benchmarks.attention", f"--topology={topology}", "--rows=2", *options]
  command += ["--length=8192", "--length=16384"]
  environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
  done = subprocess.run(
    command, cwd=runs.ROOT, env=environment, check=True, timeout=600, capture_output=True, text=True
  )
  (short, long) = ([float(number) for number in found] for found in LINE.findall(done.stdout))
  # Forward, and at least one kernel backward.
  assert short[1] >= 2 and long[1] >= 2
  for index in (2, 3):
    assert long[index] < 2.5 * short[index] + 64
    assert long[index] < long[4] / 10
