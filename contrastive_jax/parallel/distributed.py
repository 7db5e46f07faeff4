"""Processes of one job: they start together, agree to stop, and wait for each other."""

import contextlib
import json
import os
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from contrastive_jax.errors import UserError
from contrastive_jax.parallel import environment

# Within which processes that fail together have all ended.
_LEAVE_SECONDS = 2.0


def initialize() -> None:
  """Joins a job of several processes, when the environment describes one and this process has not joined it yet.

  TPU pods, SLURM and Open MPI are recognised by JAX itself when `CJAX_MULTIHOST=1`. Anywhere else, set all of
  `CJAX_COORDINATOR` (host:port), `CJAX_PROCESSES` and `CJAX_PROCESS` for each process.

  Raises:
    UserError: naming a variable that is unknown, has no usable value or lacks the others, or if the job cannot be
      joined.
  """
  job = environment.job(os.environ)
  if job is None or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(job.coordinator, num_processes=job.processes, process_id=job.process)
  except (ValueError, RuntimeError) as error:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    if job.coordinator:
      named = f"CJAX_COORDINATOR={job.coordinator}, CJAX_PROCESSES={job.processes}, CJAX_PROCESS={job.process}"
    else:
      named = "CJAX_MULTIHOST=1, which needs a cluster that JAX knows, or set CJAX_COORDINATOR in its place"
    raise UserError(f"this process cannot join its job ({reason}): check {named}") from error


def is_main() -> bool:
  """Says whether this process writes the files that exist once."""
  return jax.process_index() == 0


def is_several() -> bool:
  """Says whether the job has more than one process."""
  return jax.process_count() > 1


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if is_several():
    multihost_utils.sync_global_devices(name)


def any_of(*flags: bool) -> list[bool]:
  """Says for each flag whether it is set on any process; all processes must ask together."""
  return np.any(np.atleast_2d(multihost_utils.process_allgather(np.array(flags))), axis=0).tolist()


def from_main(value: Any) -> Any:
  """Returns on every process what the main process passes; all of them must call it.

  Args:
    value: a value that JSON can hold. The values of other processes are dropped.
  """
  if not is_several():
    return value
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  content = content if is_main() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())


def leave() -> None:
  """Lets the process that the others report to leave after them, since its loss would end them without a word."""
  if is_several() and is_main():
    time.sleep(_LEAVE_SECONDS)


class StopRequest:
  """Turns SIGINT, SIGTERM and SIGHUP into a request to stop that every host sees at the same step.

  Each step, `agree` starts a tiny all-reduce of the hosts' flags and returns the answer of the step before, so that no
  host waits for a round trip. A second SIGINT or SIGTERM acts as if nothing had been installed. SIGHUP, which a closed
  terminal sends, comes from its shell as well as from the kernel and may come several times; where it was ignored when
  the process started, as under `nohup`, it stays ignored.

  Attributes:
    exit_code: exit code of an interrupted command, 128 and the number of the signal; SIGTERM's if this host got none.
    failed: whether any host of several has told `agree` that it failed.
  """

  def __init__(self, mesh: Mesh):
    self._requested = threading.Event()
    self.exit_code = 128 + signal.SIGTERM
    self.failed = False
    self._mesh = mesh
    self._previous: dict[int, Any] = {}
    self._pending: jax.Array | None = None
    self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
          continue
        self._previous[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, _frame) -> None:
    self._requested.set()
    self.exit_code = 128 + number
    # Straight to the descriptor: the handler may have interrupted a print.
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
      os.write(2, f"{name}: stopping after this step, with a checkpoint; a second signal ends at once.\n".encode())
    if number != signal.SIGHUP:
      signal.signal(number, self._previous[number])

  def agree(self, failing: bool = False) -> bool:
    """Says whether any host has been asked to stop; the answer is the same on every host, as is `failed` afterwards.

    Args:
      failing: whether this host cannot go on.
    """
    if jax.process_count() == 1:
      return self._requested.is_set()
    sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    flag = np.full(jax.local_device_count(), 2 if failing else self._requested.is_set(), np.int32)
    pending, self._pending = self._pending, self._any(jax.make_array_from_process_local_data(sharding, flag))
    told = 0 if pending is None else int(pending)
    self.failed = told == 2
    return told == 1
