"""One run a directory: a lock that ends with its process, whatever ends that, on local and on network file systems.

The kernel's `flock` decides where it works. Where it does not reach (another machine, or a file system without it) the
record in the file decides: who holds it, and a heartbeat, which is the file's time of modification.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from contrastive_jax.errors import SaveError, UserError
from contrastive_jax.parallel import distributed

NAME = "run.lock"
HEARTBEAT_SECONDS = 10.0
# A holder on another machine without a heartbeat for so long is taken to be dead.
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0
# Within which two that start at once without `flock` have both written their record.
SETTLE_SECONDS = 1.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunLock:
  """Holds a directory for the processes of one job; `with` releases it.

  The main process takes the lock, and every process of the job learns whether it did.
  """

  def __init__(self, folder: Path):
    """Prepares to lock a folder, which is made when it is not there.

    Args:
      folder: the run directory.
    """
    self._folder, self._path = folder, folder / NAME
    self._file: int | None = None
    self._made = False
    self._ended = threading.Event()
    self._sure_at = -math.inf

  def __enter__(self) -> "RunLock":
    refusal, full = "", False
    if distributed.is_main():
      try:
        self._acquire()
      except UserError as error:
        refusal = str(error)
      except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space there and run the same command again" if full else "name another, or allow writing"
        refusal = f"{self._folder} cannot be written ({error.strerror}): {way_out}"
    # The exit code is part of what all processes are told.
    told = distributed.from_main(f"{'full' if full else 'held'} {refusal}" if refusal else "")
    if told:
      kind, _, sentence = told.partition(" ")
      raise (SaveError if kind == "full" else UserError)(sentence)
    return self

  def __exit__(self, *_) -> None:
    if self._file is None:
      return
    self._ended.set()
    try:
      if self._is_ours():
        self._path.unlink()
      if self._made:
        self._folder.rmdir()  # What was made for the lock alone; a folder that holds anything stays.
    except OSError:
      pass
    os.close(self._file)
    self._file = None

  def confirm(self, here: bool = False) -> None:
    """Raises if the directory is no longer this process's; called before anything is written there.

    A process that was suspended gives no sign of life, and another machine may have followed it. Only after so long a
    silence is the file looked at.

    Args:
      here: asks also whether the directory is still in its place. One that was removed or renamed would be made anew by
        what is written next.

    Raises:
      SaveError: if another holder took the directory over, or it is gone.
    """
    if here and self._file is not None and not _same_file(self._file, self._path):
      raise SaveError(
        f"{self._folder} was removed or renamed while this process worked on it: put it back and run the same command"
        " again"
      )
    if self._file is None or _now() - self._sure_at < STALE_SECONDS / 2:
      return
    before = _now()
    holder = _read(self._path)
    if holder and holder.get("token") != self._record["token"]:
      raise SaveError(
        f"{self._folder} was taken over by {_named(holder)} while this process was suspended: this one writes nothing"
        " more there and ends; wait for the other or stop it before the same command is run again"
      )
    self._sure_at = before

  def _acquire(self) -> None:
    self._made = not self._folder.exists()
    self._folder.mkdir(parents=True, exist_ok=True)
    while True:
      file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        kernel = _flock(file)
        if kernel and not _same_file(file, self._path):
          os.close(file)  # Its holder has just removed it.
          continue
        self._refuse_if_held(file, kernel)
        if not _same_file(file, self._path):
          os.close(file)  # Its holder has released it while we were looking.
          continue
        self._record = _me()
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(self._record).encode(), 0)
        if not kernel:
          # Two may have found nobody at once: the last to write has it.
          time.sleep(SETTLE_SECONDS)
          if _read(self._path).get("token") != self._record["token"]:
            raise _held(self._folder, _read(self._path))
      except BaseException:
        os.close(file)
        raise
      break
    self._file, self._sure_at = file, _now()
    threading.Thread(target=self._beat, name="run lock", daemon=True).start()

  def _refuse_if_held(self, file: int, kernel: bool | None) -> None:
    holder = _read(self._path)
    if kernel is False:
      raise _held(self._folder, holder)
    if not holder:
      return
    here = _me()
    # Containers of one machine share its boot, and each counts processes on its own.
    if all(holder.get(name) == here[name] for name in ("boot", "host", "namespace")):
      # The kernel gave us its lock, or says that its process is gone.
      if kernel or _start_of(holder.get("pid", 0)) != holder.get("start"):
        return
      raise _held(self._folder, holder)
    age = self._age(file)
    if age < STALE_SECONDS and self._beats(max(0.0, STALE_SECONDS - max(0.0, age)), holder):
      raise _held(self._folder, holder)

  def _beats(self, seconds: float, holder: dict[str, Any]) -> bool:
    """Waits for a sign of life of the holder, for so many seconds, and says whether it came."""
    last = self._path.stat().st_mtime_ns
    print(
      f"{self._folder} was last in use by {_named(holder)}: waiting up to {seconds:.0f} s to see whether it still is.",
      file=sys.stderr,
      flush=True,
    )
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
      time.sleep(min(POLL_SECONDS, seconds))
      try:
        # Network file systems answer from a cache, unless the file is opened anew.
        with open(self._path, "rb") as again:
          if os.fstat(again.fileno()).st_mtime_ns != last:
            return True
      except FileNotFoundError:
        return False  # It has ended and released the directory; the caller finds that out and begins again.
    return False

  def _age(self, file: int) -> float:
    """Returns the seconds since the last heartbeat by the file system's own clock, since clocks of machines differ."""
    probe = self._folder / f".{NAME}.{uuid.uuid4().hex}"
    probe.touch()
    try:
      return probe.stat().st_mtime - os.fstat(file).st_mtime
    finally:
      probe.unlink(missing_ok=True)

  def _is_ours(self) -> bool:
    return _read(self._path).get("token") == self._record["token"]

  def _beat(self) -> None:
    while not self._ended.wait(HEARTBEAT_SECONDS):
      # A file system may be full or away for a while; the lock is not lost by that.
      with contextlib.suppress(OSError, TypeError):
        before = _now()
        if self._is_ours():
          os.utime(self._file)
          self._sure_at = before


def _now() -> float:
  """Returns the seconds of a clock that goes on while this process, or its machine, is suspended."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _flock(file: int) -> bool | None:
  """Says whether the kernel gave its lock; None where the file system has no locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      return False
    if error.errno in _NO_FLOCK:
      return None
    raise
  return True


def _same_file(file: int, path: Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _read(path: Path) -> dict[str, Any]:
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}


def _me() -> dict[str, Any]:
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "start": _start_of(os.getpid()),
    "boot": _text("/proc/sys/kernel/random/boot_id"),
    "namespace": _link("/proc/self/ns/pid"),
    "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "token": uuid.uuid4().hex,
  }


def _start_of(pid: int) -> str | None:
  """Returns when a process of this machine started, in ticks; "" where nobody says, None where there is no process."""
  stat = _text(f"/proc/{pid}/stat")
  if stat:
    return stat.rpartition(")")[2].split()[19]
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except OSError:
    pass
  return ""


def _text(path: str) -> str:
  try:
    return Path(path).read_text().strip()
  except OSError:
    return ""


def _link(path: str) -> str:
  try:
    return os.readlink(path)
  except OSError:
    return ""


def _held(folder: Path, holder: dict[str, Any]) -> UserError:
  return UserError(f"{folder} is in use by {_named(holder)}: wait for it, stop it, or name another directory")


def _named(holder: dict[str, Any]) -> str:
  if not {"pid", "host", "since"} <= holder.keys():
    return "another process"
  return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
