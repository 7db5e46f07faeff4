"""Data workers end with the process that they read for, whatever ends it."""

import multiprocessing
import os
import threading
from multiprocessing import connection

_POLL_SECONDS = 1.0
_following = False


def follow_parent() -> None:
  """In a worker process, starts a thread that ends the process once its parent is gone; elsewhere does nothing.

  A killed parent cannot stop its workers, and they would wait for it for ever. Linux's PR_SET_PDEATHSIG is not used: it
  fires when the *thread* that started the worker ends, which may be long before its process does.
  """
  global _following
  parent = multiprocessing.parent_process()
  if parent is None or _following:
    return
  _following = True
  threading.Thread(target=_watch, args=(parent.sentinel, os.getppid()), name="follow parent", daemon=True).start()


def _watch(sentinel: int, parent: int) -> None:
  # The sentinel closes at once when the parent dies; its number is the answer where a sibling holds the other end.
  while not connection.wait([sentinel], timeout=_POLL_SECONDS) and os.getppid() == parent:
    pass
  os._exit(1)
