"""Metrics of a run, sent to a JSONL file, TensorBoard, Weights & Biases, and the progress bar."""

import collections
import contextlib
import errno
import logging
import math
import os
import re
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from contrastive_jax import sessions
from contrastive_jax.errors import UserError
from contrastive_jax.runs import JsonLines, write_atomically

log = logging.getLogger(__name__)

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
  """Returns the FLOP/s of all devices: the data sheet's, or that of a measured product where the kind is unknown."""
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


class Board:
  """TensorBoard's event file, written in this thread: a failure in a thread of its own would block the run for ever.

  Rows that cannot be written are dropped and counted; the rows after them go into a new file once there is room.

  Attributes:
    dropped: number of rows that were lost.
  """

  def __init__(self, workdir: Path, *, purge_step: int | None):
    """Opens no file before the first row; rows from `purge_step` on that an earlier start wrote are hidden."""
    self._workdir, self._purge_step = workdir, purge_step
    self._events: Any = None
    self._files = 0
    self.dropped = 0

  def write(self, numbers: Mapping[str, float], step: int) -> None:
    # Half a second to import, and only training needs it.
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    # It warns of each number that is not finite, and the run says itself what becomes of one.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    try:
      if self._events is None:
        self._open(event_pb2)
      for name, value in numbers.items():
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
      self._events.flush()
    except OSError as error:
      if not self.dropped:
        log.warning("TensorBoard's file cannot be written (%s): its rows are dropped until it can.", error.strerror)
      self.dropped += 1
      self._abandon()

  def _open(self, event_pb2: Any) -> None:
    from tensorboardX.event_file_writer import EventsWriter

    if not self._workdir.is_dir():
      raise FileNotFoundError(errno.ENOENT, "the run directory is gone")
    self._files += 1
    self._events = EventsWriter(str(self._workdir / "events"), f".{os.getpid()}.{self._files}")
    if self._purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.write_event(event_pb2.Event(wall_time=time.time(), step=self._purge_step, session_log=start))
      self._purge_step = None

  def _abandon(self) -> None:
    events, self._events = self._events, None
    with contextlib.suppress(OSError):
      if events is not None:
        events.close()

  def close(self) -> None:
    self._abandon()
    if self.dropped:
      log.warning("TensorBoard: %d rows could not be written and are lost.", self.dropped)


class Writer:
  """Sends each logged row to every place that is configured; only the main process makes one. It never ends a run."""

  def __init__(
    self,
    workdir: Path,
    *,
    restored_step: int,
    wandb_project: str = "",
    config: Any = None,
    session: sessions.Session | None = None,
  ):
    self._session = session
    self._rows = JsonLines(workdir / "metrics.jsonl", restored_step=restored_step)
    self._board = Board(workdir, purge_step=restored_step + 1 if restored_step else None)
    self._wandb = _start_wandb(wandb_project, workdir, config) if wandb_project else None
    self._wandb_dropped = 0

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes one row; it must have a `step`, the number of updates done."""
    self._rows.write({name: _readable(value) for name, value in row.items()})
    if self._session is not None:
      self._session.reach(row["step"])
    numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    self._board.write(numbers, row["step"])
    self._to_wandb(lambda wandb: wandb.log(numbers, step=row["step"]))

  def _to_wandb(self, call: Callable[[Any], object]) -> None:
    if self._wandb is None:
      return
    try:
      call(self._wandb)
    except Exception as error:  # Its client has errors of its own, and those of the network.
      if not self._wandb_dropped:
        log.warning("Weights & Biases takes no rows (%s): they are dropped until it does.", _short(error))
      self._wandb_dropped += 1

  def close(self) -> None:
    self._rows.close()
    self._board.close()
    self._to_wandb(lambda wandb: wandb.finish())
    if self._wandb_dropped:
      log.warning("Weights & Biases: %d calls failed and their rows are lost.", self._wandb_dropped)


def _readable(value: Any) -> Any:
  """Rounds numbers to six digits, more than any curve shows, and replaces those that JSON cannot hold."""
  if not isinstance(value, float):
    return value
  return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _short(error: Exception) -> str:
  return " ".join(str(error).split())[:100]


def _start_wandb(project: str, workdir: Path, config: Any) -> Any:
  try:
    import wandb
  except ImportError:
    raise UserError(f"wandb_project='{project}' needs Weights & Biases: pip install wandb") from None
  name, known = workdir.resolve().name, wandb_id(workdir)
  try:
    return wandb.init(project=project, name=name, dir=str(workdir), config=config, resume="allow", id=known)
  except Exception as error:  # Its client has errors of its own, and those of the network.
    log.warning("Weights & Biases cannot be reached (%s): it takes no row of this session.", _short(error))
    return None


def wandb_id(workdir: Path) -> str:
  """Returns the id of a run at Weights & Biases, which is drawn once and kept in `wandb_id.txt` of its directory.

  A run that logged there before there was this file is known by the name of its directory, and stays so.
  """
  path = workdir / "wandb_id.txt"
  stored = path.read_text(errors="replace").strip() if path.exists() else ""
  if re.fullmatch(r"[A-Za-z0-9_.-]+", stored):
    return stored
  name = workdir.resolve().name
  if (workdir / "wandb").is_dir():
    chosen = name
  else:
    chosen = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:64]}-{uuid.uuid4().hex[:8]}"
  write_atomically(path, chosen + "\n")
  return chosen


class Pace:
  """Estimates how long the steps to come will take, judged by the latest ones.

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
    """Returns the seconds that `steps` more steps will take; None while only one step has ended."""
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
      self._console.print(f"step {row['step']}/{self._total} · {numbers} · {left}", highlight=False, soft_wrap=True)

  def _left(self, step: int) -> str:
    seconds = self._pace.remaining(self._total - step)
    return "" if seconds is None else f"{sessions.duration(seconds)} left"

  def say(self, message: str) -> None:
    """Prints a line above the bar."""
    self._console.print(message, highlight=False, markup=False, soft_wrap=True)
