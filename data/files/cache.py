"""Ranges of remote files that are kept on this machine, in a folder of bounded size which many processes share.

The entries lie in drawers, subfolders with a share of the bytes each, so that what is used least is found among few. A
drawer is locked while an entry is written, and counts its bytes before they are: it never holds more than its share.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from contrastive_jax.errors import UserError

# Bytes of a drawer, of which there is at least one and not more than the most.
_DRAWER_BYTES = 64 << 20
_MOST_DRAWERS = 1024
# What a file system takes at least for a file, and rounds up to.
_BLOCK = 4096
_SUM_BYTES = 4
_TOTAL = ".total"


class RangeCache:
  """Keeps ranges of files, and drops those that have not been used for longest when there is no room.

  An entry that was cut or damaged is noticed by its checksum and is not there. What cannot be written, as on a full
  disk, is not kept.
  """

  def __init__(self, folder: Path, most_bytes: int):
    """Makes the folder.

    Args:
      folder: the folder of the cache, for nothing else. Drawers of an earlier and larger cache are removed.
      most_bytes: the bytes that all entries together may take on the disk.

    Raises:
      UserError: if the folder cannot be locked.
    """
    self._folder = folder
    self._drawers = min(max(most_bytes // _DRAWER_BYTES, 1), _MOST_DRAWERS)
    self._share = most_bytes // self._drawers
    folder.mkdir(parents=True, exist_ok=True)
    try:
      with locked(folder / _TOTAL):
        for entry in folder.iterdir():
          if entry.name.isdecimal() and int(entry.name) >= self._drawers:
            shutil.rmtree(entry, ignore_errors=True)
    except OSError as error:
      raise UserError(
        f"{folder} cannot hold the cache ({error.strerror}): name a folder on a disk of this machine"
      ) from None

  def get(self, key: str, size: int) -> bytes | None:
    """Returns the entry of a key, or None where there is none that is whole.

    Args:
      key: what `put` was given.
      size: number of bytes of the entry.
    """
    path = self._path(key)
    try:
      with open(path, "rb", buffering=0) as file:
        stored = file.read()
      if len(stored) == _SUM_BYTES + size and _sum(stored[_SUM_BYTES:]) == stored[:_SUM_BYTES]:
        _mark_used(path)
        return stored[_SUM_BYTES:]
      path.unlink()
    except OSError:
      pass
    return None

  def put(self, key: str, content: bytes) -> bool:
    """Keeps the content under a key, and says whether it did.

    Args:
      key: the file, its version and the range: whoever asks for the same key means the same bytes.
      content: the bytes.
    """
    path, needed = self._path(key), _on_disk(_SUM_BYTES + len(content))
    if needed > self._share:
      return False
    # One name for all, since the lock lets one at a time write it; what a killed process left is written over.
    partial = path.with_name(".partial")
    try:
      path.parent.mkdir(exist_ok=True)
      with locked(path.with_name(_TOTAL)) as total:
        counted = os.pread(total, 8, 0)
        held = int.from_bytes(counted, "little")
        if len(counted) < 8 or held + needed > self._share:
          # More than is needed, so that it is not looked for at every entry.
          held = _shrunk(path.parent, self._share - max(needed, self._share // 8))
        os.pwrite(total, (held + needed).to_bytes(8, "little"), 0)
        with open(partial, "wb", buffering=0) as file:
          for part in (_sum(content), content):
            if file.write(part) != len(part):
              return False
        _mark_used(partial)
        partial.replace(path)
    except OSError:
      return False
    return True

  def _path(self, key: str) -> Path:
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
    return self._folder / f"{int(name[:8], 16) % self._drawers:04d}" / name


def _shrunk(drawer: Path, most_bytes: int) -> int:
  """Removes the entries of a drawer that were used least recently; returns the bytes of those that stay."""
  with os.scandir(drawer) as entries:
    found = [(entry.stat(), entry.path) for entry in entries if entry.name != _TOTAL]
  held = sum(_on_disk(stat.st_size) for stat, _ in found)
  for stat, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
    if held <= most_bytes:
      break
    os.unlink(path)
    held -= _on_disk(stat.st_size)
  return held


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
  """Holds the kernel's lock of a file, which ends with the process; yields its descriptor."""
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield file
  finally:
    # Closing alone leaves the lock to a child that was forked meanwhile.
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _mark_used(path: Path) -> None:
  now = time.time_ns()  # File systems themselves note times a few milliseconds apart.
  os.utime(path, ns=(now, now))


def _on_disk(size: int) -> int:
  return -(-size // _BLOCK) * _BLOCK


def _sum(content: bytes) -> bytes:
  return zlib.crc32(content).to_bytes(_SUM_BYTES, "little")
