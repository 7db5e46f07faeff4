"""Turns panics of libraries written in Rust into errors that can be caught, without the stack that they print."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


class PanicError(ValueError):
  """A library failed in a way that it has no error for."""


@contextlib.contextmanager
def as_errors() -> Iterator[None]:
  """Turns a panic within the block into a `PanicError`, and drops what it wrote to the standard error stream.

  A panic is no `Exception`, so that it would pass by whatever handles errors. What others write meanwhile is written
  afterwards.

  Raises:
    PanicError: with the message of the panic.
  """
  try:
    kept = os.dup(2)
  except OSError:
    # Nothing is shown where there is no standard error stream.
    kept = None
  with tempfile.TemporaryFile() as held:
    if kept is not None:
      sys.stderr.flush()
      os.dup2(held.fileno(), 2)
    panicked = False
    try:
      yield
    except BaseException as error:
      if type(error).__name__ != "PanicException":
        raise
      panicked = True
      raise PanicError(str(error)) from None
    finally:
      if kept is not None:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        held.seek(0)
        written = held.read()
        if written and not panicked:
          os.write(2, written)
