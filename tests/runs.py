"""Runs the command-line tools as a user does, and reads what they leave behind."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

ROOT = Path(__file__).parents[1]
TINY = "--config=tests/tiny.py"
# Programs that run for seconds are compiled as `make test` does it: a run of several devices is mostly that.
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def start(
  script: str, *arguments: str, devices: int = 1, start_new_session: bool = False, **environment: str
) -> subprocess.Popen:
  """Starts a script on emulated CPU devices."""
  settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICKLY_COMPILED}
  return subprocess.Popen(
    [sys.executable, script, *arguments],
    cwd=ROOT,
    env={**os.environ, **settings, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=start_new_session,
  )


def finish(process: subprocess.Popen, expected: int = 0) -> str:
  """Waits for a script and returns what it printed."""
  output, _ = process.communicate(timeout=600)
  assert process.returncode == expected, output
  return output


def run(script: str, *arguments: str, expected: int = 0, **options: Any) -> str:
  return finish(start(script, *arguments, **options), expected)


def train(workdir: Path, *overrides: str, **options: Any) -> str:
  """Trains the tiny config."""
  return run("train.py", TINY, f"--workdir={workdir}", *overrides, **options)


def start_together(start_one: Callable[..., subprocess.Popen], processes: int) -> list[subprocess.Popen]:
  """Starts one job of several processes; `start_one` takes the environment of each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  job = {"CJAX_COORDINATOR": f"localhost:{port}", "CJAX_PROCESSES": str(processes)}
  return [start_one(**job, CJAX_PROCESS=str(index)) for index in range(processes)]


def train_together(workdir: Path, *overrides: str, processes: int, devices: int) -> list[str]:
  """Trains the tiny config in one job of several processes."""
  one = functools.partial(start, "train.py", TINY, f"--workdir={workdir}", *overrides, devices=devices)
  return [finish(process) for process in start_together(one, processes)]


def final_state(workdir: Path) -> dict[str, np.ndarray]:
  """Every leaf of the newest checkpoint, by name."""
  with ocp.training.Checkpointer(workdir / "checkpoints") as manager:
    described = manager.checkpointables_metadata(None).metadata["state"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), described)
    state = manager.load_checkpointables(None, {"state": shapes})["state"]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def rows(path: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def losses(workdir: Path) -> np.ndarray:
  """The loss of every logged step."""
  return np.array([row["loss"] for row in rows(workdir / "metrics.jsonl") if "loss" in row])


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
  """Every leaf equal to `tolerance` times the largest entry of its tensor."""
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    bound = tolerance * max(np.abs(leaf).max(initial=0.0), 1e-6)
    np.testing.assert_allclose(leaf, other[name], rtol=0, atol=bound, err_msg=name)
