"""Changes to Orbax: it opens folders with damaged checkpoints, says at once what failed, and says it once."""

import asyncio
import datetime
import logging
import os
import sys
import traceback
from pathlib import Path

from orbax.checkpoint._src.checkpointers import async_checkpointer
from orbax.checkpoint._src.path import step as orbax_steps


def _list_damaged_checkpoints() -> None:
  """Lets Orbax open a folder in which the metadata of a checkpoint are damaged.

  It asks every checkpoint for the time of its commit when the folder is opened, and raises what its parser raises. The
  time of the folder stands in for it; reading the checkpoint then says what is wrong.
  """
  original = orbax_steps.Metadata.commit_timestamp.fget

  def commit_timestamp(self):
    try:
      return original(self)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
      return datetime.datetime.fromtimestamp(os.stat(self.path).st_mtime, tz=datetime.UTC)

  orbax_steps.Metadata.commit_timestamp = property(commit_timestamp)


def _remember_failures() -> None:
  """Has Orbax keep the error that ended a save where `Checkpoints` sees it at once.

  It raises the error itself only when all processes have met, and a process whose own part is written waits for the one
  that failed for 20 minutes.
  """

  def get(self):
    return self.__dict__.get("_exception")

  def put(self, error):
    self.__dict__["_exception"] = error
    if error is not None:
      self.failure = error

  async_checkpointer._AsyncManager._exception = property(get, put)


def _is_news(record: logging.LogRecord) -> bool:
  """Says whether a message is news: errors of Orbax and its threads are raised to us too, and told in a sentence."""
  if record.levelno >= logging.ERROR and "orbax" in Path(record.pathname).parts:
    return False  # Some show all of a damaged file.
  trace = record.exc_info[2] if record.exc_info else None
  if trace is None:
    return True
  frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
  return not any("orbax" in Path(name).parts for name in frames)


def _drop_late_answers() -> None:
  """Keeps TensorStore from printing a traceback for each array whose event loop a failed save has closed.

  It calls the loop from threads of its own and hands what that raises to `sys.unraisablehook`, with no frame but those
  of asyncio.
  """
  previous = sys.unraisablehook

  def hook(unraisable):
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(unraisable.exc_traceback)]
    if unraisable.exc_type is RuntimeError and frames and all(name == asyncio.base_events.__file__ for name in frames):
      return
    previous(unraisable)

  sys.unraisablehook = hook


def apply() -> None:
  """Applies all changes, once for the process."""
  _list_damaged_checkpoints()
  _remember_failures()
  _drop_late_answers()
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_news)
