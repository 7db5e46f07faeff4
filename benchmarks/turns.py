"""Contestants in processes of their own, all on the same core, that do a share of work each in turn.

Libraries that cannot be imported side by side are compared so. Only the standard library is imported here, since a
contestant may run in another Python.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Libraries that start threads start one.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_ENVIRONMENT = {name: "1" for name in _THREADS} | {
  "JAX_PLATFORMS": "cpu",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "CUDA_VISIBLE_DEVICES": "",
}


class Turn(NamedTuple):
  """What a contestant did in one turn.

  Attributes:
    items: how many items it did.
    processor: seconds of processor time since the turn before. Wall time would not count what some libraries read ahead
      while others take their turns.
  """

  items: int
  processor: float


class Contestant:
  """A process that takes turns; it has loaded what it needs once this returns.

  Attributes:
    name: what the table calls it.
    failure: the end of what it wrote where it could not start; "" where it could.
  """

  def __init__(self, name: str, command: Sequence[str], core: int):
    """Starts the process on one core, and waits until it is ready.

    Args:
      name: what the table calls it.
      command: the command, whose process calls `serve`.
      core: number of the core.
    """
    self.name, self.failure = name, ""
    # Not a pipe, which nobody would read while the process runs.
    self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`.
    self._process = subprocess.Popen(
      list(command),
      cwd=ROOT,
      env={**os.environ, **_ENVIRONMENT},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._said,
      text=True,
      preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if self._process.stdout.readline().strip() != "ready":
      self.failure = self._end()

  def turn(self, count: int) -> Turn:
    """Lets it do `count` batches.

    Raises:
      RuntimeError: if it ends before.
    """
    self._process.stdin.write(f"{count}\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f"{self.name} ended: {self._end()}")
    return Turn(*json.loads(answer))

  def close(self) -> None:
    """Ends the process."""
    if self._process.poll() is None:
      self._process.communicate()
    self._said.close()

  def _end(self) -> str:
    """Waits for the end of the process, and returns the last line that it wrote."""
    self._process.communicate()
    self._said.seek(0)
    lines = self._said.read().strip().splitlines()
    return lines[-1] if lines else f"it ended with {self._process.returncode}"


def serve(work: Callable[[int], int]) -> None:
  """Answers, in a contestant, each number of batches that it is asked for, until its input ends.

  Args:
    work: a function that does so many batches and returns the number of items in them.
  """
  # Whatever a library prints goes to standard error.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  work(1)
  print("ready", file=answers, flush=True)
  ended = time.process_time()
  for line in sys.stdin:
    items = work(int(line))
    before, ended = ended, time.process_time()
    print(json.dumps(Turn(items, ended - before)), file=answers, flush=True)
