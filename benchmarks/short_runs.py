"""Runs of `train.py` that benchmarks compare: begun, or gone on with, as a user does, and read when they are done."""

import subprocess
import sys
from pathlib import Path

from contrastive_jax.evaluation.results import read_result

_ROOT = Path(__file__).parents[1]


def train(config: str, workdir: Path, *options: str) -> None:
  """Trains a config, unless that is done; ends the benchmark when the run stops early."""
  command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir.absolute()}", *options]
  if subprocess.run(command, cwd=_ROOT).returncode:
    sys.exit(f"{workdir} stopped: run the same command again to go on")


def score(workdir: Path, dataset: str, metric: str) -> float:
  """Returns a metric of a finished run, as its result has it."""
  (path,) = (workdir / "eval").glob(f"{dataset}@*.json")
  return read_result(path)["metrics"][metric]
