"""Attention, compiled for TPUs and GPUs that are not here."""

import os
import re
import subprocess

import pytest

from tests import runs

PLAN_PYTHON = runs.ROOT / ".venv-plan" / "bin" / "python"
LINE = re.compile(r"(\d+) tokens: (\d+) kernels +([\d.]+) MiB, blocks +([\d.]+) MiB; dense logits alone +(\d+) MiB")
TIMES = re.compile(r"(\d+) tokens: .* time over its ([\d.]+)x")


def benchmark(*options):
  if not PLAN_PYTHON.exists():
    pytest.skip("`make plan` has not been run")
  command = [str(PLAN_PYTHON), "-m", "benchmarks.attention", *options]
  environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
  return subprocess.run(
    command, cwd=runs.ROOT, env=environment, check=True, timeout=600, capture_output=True, text=True
  ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--head_dim=80"], ["--head_dim=64", "--dtype=float32"]])
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:4"])
def test_memory_is_linear_in_the_length(topology, options):
  output = benchmark(f"--topology={topology}", "--rows=2", *options, "--length=8192", "--length=16384")
  (short, long) = ([float(number) for number in found] for found in LINE.findall(output))
  # Forward, and at least one kernel backward.
  assert short[1] >= 2 and long[1] >= 2
  for index in (2, 3):
    assert long[index] < 2.5 * short[index] + 64
    assert long[index] < long[4] / 10


@pytest.mark.slow
def test_a_tpu_passes_over_the_logits_of_an_image_less_often_than_without_care():
  output = benchmark("--topology=v5e:2x2", "--rows=128", "--heads=12", "--head_dim=64", "--length=196", "--length=257")
  ratios = {int(length): float(ratio) for length, ratio in TIMES.findall(output)}
  assert set(ratios) == {196, 257} and max(ratios.values()) < 0.9
