"""Where numbers go: a JSONL file, TensorBoard, Weights & Biases, and the progress bar."""

import collections
import json
import math
import os
import re
import statistics
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from contrastive_jax import sessions
from contrastive_jax.errors import UserError

# Dense bfloat16 peaks in FLOP/s of one device, from the vendors' data sheets; names as in `jax.Device.device_kind`.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(devices: list[jax.Device]) -> float:
  """FLOP/s of all devices: the data sheet's where the kind is known, else that of a measured float32 matrix product."""
  kind = devices[0].device_kind
  if kind in PEAK_FLOPS:
    return PEAK_FLOPS[kind] * len(devices)
  side = 1024
  matrix = jnp.ones((side, side), jnp.float32)
  multiply = jax.jit(lambda a: a @ a)
  multiply(matrix).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    multiply(matrix).block_until_ready()
    seconds.append(time.perf_counter() - start)
  measured = 2 * side**3 / min(seconds)
  # Emulated CPU devices share one processor: its speed does not grow with their number.
  return measured if kind == "cpu" else measured * len(devices)


class JsonLines:
  """A file of one JSON object a line, which a restart cuts back to the step it restored."""

  def __init__(self, path: Path, *, restored_step: int):
    """Opens `path` for appending, without the rows after `restored_step` or a line that a kill left unfinished."""
    rows = []
    if path.exists():
      for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > restored_step:
          break
        rows.append(line)
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(rows))
    os.replace(whole, path)
    self._file = path.open("a")

  def write(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Rows of a `JsonLines` file; empty when there is none."""
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Writer:
  """Sends each logged row to every place that is configured; only the main process makes one."""

  def __init__(
    self,
    workdir: Path,
    *,
    restored_step: int,
    wandb_project: str = "",
    config: Any = None,
    session: sessions.Session | None = None,
  ):
    from tensorboardX import SummaryWriter  # Half a second to import, and only training needs it.

    self._session = session
    self._rows = JsonLines(workdir / "metrics.jsonl", restored_step=restored_step)
    self._board = SummaryWriter(str(workdir), purge_step=restored_step + 1 if restored_step else None)
    self._wandb = _start_wandb(wandb_project, workdir, config) if wandb_project else None

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes one row; it must have a `step`, the number of updates done."""
    self._rows.write({name: _readable(value) for name, value in row.items()})
    if self._session is not None:
      self._session.reach(row["step"])
    numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    for name, value in numbers.items():
      self._board.add_scalar(name, value, row["step"])
    if self._wandb is not None:
      self._wandb.log(numbers, step=row["step"])

  def close(self) -> None:
    self._rows.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _readable(value: Any) -> Any:
  """JSON has no NaN; six digits are more than any curve shows."""
  if not isinstance(value, float):
    return value
  return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _start_wandb(project: str, workdir: Path, config: Any) -> Any:
  try:
    import wandb
  except ImportError:
    raise UserError(f"wandb_project='{project}' needs Weights & Biases: pip install wandb") from None
  name = workdir.resolve().name
  return wandb.init(project=project, name=name, dir=str(workdir), config=config, resume="allow", id=wandb_id(workdir))


def wandb_id(workdir: Path) -> str:
  """Returns the id of a run at Weights & Biases, which is drawn once and kept in `wandb_id.txt` of its directory.

  A run that logged there before there was this file is known by the name of its directory, and stays so.
  """
  path = workdir / "wandb_id.txt"
  if path.exists() and path.read_text().strip():
    return path.read_text().strip()
  name = workdir.resolve().name
  if (workdir / "wandb").is_dir():
    chosen = name
  else:
    chosen = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:64]}-{uuid.uuid4().hex[:8]}"
  whole = path.with_suffix(".tmp")
  whole.write_text(chosen + "\n")
  os.replace(whole, path)
  return chosen


class Pace:
  """How long the steps to come will take, judged by the latest ones.

  The first step of a session holds its compilation, and a step that waited for an evaluation, a checkpoint or the
  compilation of the next stage holds that too. Neither says how long other steps take, so both are left out.
  """

  # Steps that the estimate rests on: enough for stages whose steps take turns, few enough to follow a new stage.
  RECENT = 64
  # A step this many times as long as the median of its neighbours was waiting for something else.
  OUTLIER = 5.0

  def __init__(self):
    self._last: float | None = None
    self._seconds: collections.deque[float] = collections.deque(maxlen=self.RECENT)

  def step(self, now: float) -> None:
    """Notes that a step ended at the time `now`, in seconds of any clock."""
    if self._last is not None:
      self._seconds.append(now - self._last)
    self._last = now

  def remaining(self, steps: int) -> float | None:
    """Seconds that `steps` more steps will take; None while only one step has ended."""
    if not self._seconds:
      return None
    bound = self.OUTLIER * statistics.median(self._seconds)
    return steps * statistics.fmean(seconds for seconds in self._seconds if seconds <= bound)


class Bar:
  """A progress bar on a terminal; elsewhere one line for each logged row."""

  def __init__(self, *, start: int, total: int, quiet: bool = False):
    self._console = Console(stderr=True, quiet=quiet)
    self._total = total
    self._pace = Pace()
    self._progress = Progress(
      TextColumn("[bold]training"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[numbers]}"),
      TextColumn("{task.fields[left]}"),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._progress.add_task("training", total=total, completed=start, numbers="compiling", left="")

  def __enter__(self) -> "Bar":
    self._progress.start()
    return self

  def __exit__(self, *_) -> None:
    self._progress.stop()

  def advance(self, step: int) -> None:
    """Shows that `step` updates have been made."""
    self._pace.step(time.perf_counter())
    self._progress.update(self._task, completed=step, left=self._left(step))

  def show(self, row: Mapping[str, Any]) -> None:
    """Shows the figures of a logged row."""
    rate, waiting = row["images_per_second"], row["data_wait_fraction"]
    numbers = f"loss {row['loss']:.3f} · {rate:.0f} images/s · {waiting:.0%} waiting for data"
    self._progress.update(self._task, numbers=numbers)
    if not self._console.is_terminal:
      left = self._left(row["step"]) or f"first step with its compilation: {sessions.duration(row['step_seconds'])}"
      self._console.print(f"step {row['step']}/{self._total} · {numbers} · {left}", highlight=False)

  def _left(self, step: int) -> str:
    seconds = self._pace.remaining(self._total - step)
    return "" if seconds is None else f"{sessions.duration(seconds)} left"

  def say(self, message: str) -> None:
    """Prints a line above the bar."""
    self._console.print(message, highlight=False, markup=False)
