"""A set as several processes read it: the same one for all, also where files have come to its folder since."""

import functools
import os
import pickle
from pathlib import Path

from contrastive_jax.errors import UserError
from data.sources.pictures import StoredPictures


def write(source: StoredPictures, path: Path) -> None:
  """Writes what `read` opens the set with."""
  with open(path, "wb") as file:
    pickle.dump(source, file)
    file.flush()
    os.fsync(file.fileno())


def read(path: str | os.PathLike) -> StoredPictures:
  """Opens the set, once in each process.

  Raises:
    UserError: if the file is not there, as on a machine that does not have the folder.
  """
  try:
    return _unpickled(os.fspath(path), os.stat(path).st_mtime_ns)
  except FileNotFoundError:
    raise UserError(f"{path} is not seen by a worker: name a folder that all machines have under one path") from None


@functools.lru_cache(1)
def _unpickled(path: str, _stamp: int) -> StoredPictures:
  with open(path, "rb") as file:
    return pickle.load(file)
