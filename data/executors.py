"""What does the work of a command: processes of this machine, or the workers of a Dask cluster.

A command hands over its work in parts, of which each is kept when it is done: after whatever ends it, the same command
goes on with the parts that are left.
"""

import concurrent.futures
import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

from contrastive_jax import progress
from contrastive_jax.errors import UserError
from data.lifetime import follow_parent

Key = TypeVar("Key", bound=Hashable)
_GOES_ON = "it goes on with what is left"


@contextlib.contextmanager
def executor(processes: int, scheduler: str = "") -> Iterator[concurrent.futures.Executor]:
  """Gives what does the work, and says in one sentence how to go on when a process, a worker or the cluster is lost.

  Args:
    processes: number of processes of this machine.
    scheduler: the address of a Dask scheduler whose workers do the work instead; "" is none.

  Raises:
    UserError: if the cluster cannot be reached, or processes or workers were lost while they worked.
  """
  if scheduler:
    with _dask(scheduler) as cluster:
      yield cluster
    return
  # Not forked: other threads of this process may hold locks, of Arrow above all.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=follow_parent) as pool:
    try:
      yield pool
    except concurrent.futures.BrokenExecutor:
      raise UserError(
        "a process that did the work was killed, perhaps for want of memory: run the command again, with fewer"
        f" --processes; {_GOES_ON}"
      ) from None
    except BaseException:
      # The pool would wait for what runs. A process leaves nothing but files that are written beside their place.
      for child in multiprocessing.active_children():
        child.kill()
      raise


def each(
  pool: concurrent.futures.Executor,
  function: Callable[..., Any],
  arguments: Mapping[Key, tuple[Any, ...]],
  what: str,
  label: str,
) -> Iterator[tuple[Key, Any]]:
  """Calls a function with each of the arguments, and yields the results with their keys as they come.

  Args:
    pool: what calls it.
    function: a function of a module that worker processes can import.
    arguments: the arguments of each call, by a key.
    what: name of the parts, such as "files", for a bar on the terminal.
    label: what stands before the bar.
  """
  running = {pool.submit(function, *given): key for key, given in arguments.items()}
  done = concurrent.futures.as_completed(running)
  # Nothing is cancelled when this ends early: who gave the pool ends its processes, and a pool whose processes have
  # ended prints a traceback for every call that was cancelled.
  for _ in progress.counted(len(running), what, label):
    future = next(done)
    yield running.pop(future), future.result()


@contextlib.contextmanager
def _dask(scheduler: str) -> Iterator[concurrent.futures.Executor]:
  try:
    import distributed
    from distributed.comm import CommClosedError
  except ImportError:
    raise UserError("--scheduler needs Dask: pip install distributed") from None
  for name in (
    "distributed",
    "distributed.client",
    "tornado.application",
  ):  # It prints tracebacks of what is told below in a sentence.
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    client = distributed.Client(scheduler)
  except (OSError, ValueError) as error:
    said = " ".join(str(error).split())[:150]
    raise UserError(
      f"--scheduler={scheduler} cannot be reached ({said}): name the address that dask scheduler printed, such as"
      " tcp://10.0.0.1:8786"
    ) from None
  try:
    yield client.get_executor(pure=False)  # Files may have changed since an equal call.
  except distributed.KilledWorker as error:
    raise UserError(
      f"workers of {scheduler} died again and again over one part of the work, the last of them"
      f" {error.last_worker.address}, perhaps for want of memory: give them more, or fewer threads, and run the"
      f" command again; {_GOES_ON}"
    ) from None
  except (concurrent.futures.CancelledError, CommClosedError):
    raise UserError(
      f"the scheduler {scheduler} was lost or stopped: start it and its workers again, then the same command;"
      f" {_GOES_ON}"
    ) from None
  except ModuleNotFoundError as error:
    raise UserError(
      f"a worker of {scheduler} cannot import {error.name!r}: start the workers in the folder of the project, with the"
      " same packages"
    ) from None
  finally:
    with contextlib.suppress(Exception):
      client.close(timeout=5)
