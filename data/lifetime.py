"""Data workers end with the process that they read for, whatever ends it, and not before it."""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, resource_tracker

from grain.multiprocessing import SharedMemoryArray

_POLL_SECONDS = 1.0
_following = _tracking = False


def follow_parent() -> None:
  """In a worker process, starts a thread that ends the process once its parent is gone; elsewhere does nothing.

  A killed parent cannot stop its workers, and they would wait for it for ever. Linux's PR_SET_PDEATHSIG is not used: it
  fires when the *thread* that started the worker ends, which may be long before its process does.

  Signals that ask to stop are ignored from then on: terminals and schedulers send them to all processes of a run, and
  the parent needs its workers until its last step is done.
  """
  global _following
  parent = multiprocessing.parent_process()
  if parent is None or _following:
    return
  _following = True
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_watch, args=(parent.sentinel, os.getppid()), name="follow parent", daemon=True).start()


def start_tracker() -> None:
  """Starts the process in which `multiprocessing` counts shared memory, and leaves it nothing to count in the end.

  A closed terminal does not end it, and it outlives SIGINT and SIGTERM by itself. Were it gone, each block of memory
  that workers hand over would print a traceback.
  """
  global _tracking
  if not _tracking:
    _tracking = True
    atexit.register(_free_shared_memory)
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
  try:
    resource_tracker.ensure_running()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_shared_memory() -> None:
  """Frees the batches that worker processes handed over and that something still holds.

  Circles of references hold the last one, and JAX until its next call. When Python frees them at its very end, the
  thread to which Grain leaves that work is gone, and the tracker prints a warning of leaked memory.
  """
  remover = SharedMemoryArray._del_thread_pool
  SharedMemoryArray._del_thread_pool = None  # From here on it is freed at once.
  gc.collect()
  if remover is not None:
    remover.close()
    remover.join()


def _watch(sentinel: int, parent: int) -> None:
  # The sentinel closes at once when the parent dies; its number is the answer where a sibling holds the other end.
  while not connection.wait([sentinel], timeout=_POLL_SECONDS) and os.getppid() == parent:
    pass
  os._exit(1)
