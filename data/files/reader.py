"""Reads files of this machine and of servers alike: exactly the bytes that are asked for, or an error.

Files of this machine are read by position from a bounded number of open descriptors. What servers do not answer, or
answer wrongly, is asked again after growing delays; `Files.tally` counts it.
"""

import functools
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

from contrastive_jax import downloads, paths
from contrastive_jax.bad_records import retried
from contrastive_jax.errors import UserError
from data.files import cache, patterns, servers
from data.files.servers import Facts, Fault, scheme
from data.files.tally import Tally

# Seconds before each further attempt to get an answer of a server.
DELAYS = (0.1, 0.4, 1.6, 6.4, 25.6)
# Seconds that a server may take for an answer, and bytes for each of which it may take one second more.
ANSWER_SECONDS = 30.0
SLOWEST = 1 << 20
# Files of this machine that are open at once in a process.
DESCRIPTORS = 128
# Bytes of each request for a file that is read front to back.
BLOCK = 8 << 20
# Ranges of a remote file with a gap of fewer bytes are asked for at once, up to so many bytes.
NEAR = 256 << 10
MOST_AT_ONCE = 32 << 20

Answer = TypeVar("Answer")


class Files:
  """Reads files by path or address, from any number of threads, before and after a fork, and where it is unpickled.

  Every method takes a path of this machine or an address by `s3://`, `gs://`, `https://` or `http://`. What a server
  fails to answer in the end is a `UserError` that names the file and what went wrong last.

  Attributes:
    tally: what this process asked of servers: "requests", "bytes", "hits" and "misses" of the cache, and for each kind
      of fault, such as "HTTP 503", "stalled" or "short answer", how often another attempt followed or was given up.
  """

  def __init__(
    self,
    *,
    cache_bytes: int = 0,
    cache_dir: str | os.PathLike | None = None,
    answer_seconds: float = ANSWER_SECONDS,
    delays: Sequence[float] = DELAYS,
  ):
    """Opens nothing yet.

    Args:
      cache_bytes: bytes of remote files, read by ranges, that are kept on this machine; 0 keeps none.
      cache_dir: the folder for them and for `local_copy`; None is contrastive_jax in the user's folder for caches.
      answer_seconds: how long a server may take for an answer, with one second more for each MiB asked.
      delays: seconds before each further attempt after a fault.

    Raises:
      UserError: if the cache is of negative size, or its folder cannot be written.
    """
    if cache_bytes < 0:
      raise UserError(f"data.cache_bytes={cache_bytes} is negative: give a number of bytes, or 0 for no cache")
    self._arguments = {
      "cache_bytes": cache_bytes,
      "cache_dir": cache_dir,
      "answer_seconds": answer_seconds,
      "delays": tuple(delays),
    }
    self._folder = downloads.cache() if cache_dir is None else Path(cache_dir)
    self._seconds, self._delays = answer_seconds, tuple(delays)
    self._ranges = None
    if cache_bytes:
      folder = paths.folder_to_write("data.cache_dir", self._folder)
      self._ranges = cache.RangeCache(folder / "ranges", cache_bytes)
    self._known: dict[str, Facts] = {}
    self._local = functools.lru_cache(DESCRIPTORS)(_LocalFile)
    self.tally = Tally()

  def __reduce__(self):
    return functools.partial(Files, **self._arguments), ()

  def expand(self, pattern: str, field: str = "files") -> list[str]:
    """Returns the files that a pattern names, sorted and each once.

    Args:
      pattern: a path or an address, with ranges and lists in braces, `{000..123}` and `{a,b}`, and, where the place
        gives lists of files, `*`, `?` and `[...]`.
      field: flag or config field that holds the pattern, which errors name.

    Raises:
      UserError: if a file that is named is missing or a folder, or if no file fits.
    """

    def is_there(file: str) -> bool:
      try:
        self.facts(file)
      except (FileNotFoundError, NotADirectoryError):
        return False
      return True

    def found(wanted: str) -> list[str]:
      return self._answer(wanted, lambda: servers.found(wanted, self._seconds))

    return patterns.expand(pattern, field=field, is_there=is_there, found=found)

  def facts(self, file: str) -> Facts:
    """Returns the size of a file and what tells its versions apart, as they are now.

    What is read from a server later has to be of this version.

    Raises:
      FileNotFoundError: if there is no such file.
      PermissionError: if it may not be read.
      UserError: if it is a folder, or its server does not answer.
    """
    if not scheme(file):
      found = os.stat(file)
      if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{file} is a folder, and files are needed: name those in it, such as {Path(file) / '*'}")
      return Facts(found.st_size, str(found.st_mtime_ns))
    known = self._answer(file, lambda: servers.facts(file, self._seconds))
    self._known[file] = known
    return known

  def read(self, file: str, offset: int, size: int) -> bytes:
    """Returns exactly the bytes of a range.

    Args:
      file: path or address of the file.
      offset: number of the first byte.
      size: number of bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      PermissionError: if it may not be read.
      OSError: if a file of this machine cannot be read.
      UserError: if the file ends before the range does, has changed on its server, or its server does not answer.
    """
    return self.read_many(file, [(offset, size)])[0]

  def read_many(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns the bytes of several ranges; a server is asked once for those that are near one another.

    Args:
      file: path or address of the file.
      ranges: offset and size in bytes of each range, in any order.

    Raises:
      As `read` does.
    """
    for offset, size in ranges:
      if offset < 0 or size < 0:
        raise ValueError(f"{file}: a range has the offset {offset} and the size {size}, and neither can be negative")
    if not scheme(file):
      try:
        return [self._local(file).read(offset, size) if size else b"" for offset, size in ranges]
      except OSError:
        self._local.cache_clear()  # On a network file system only what is opened anew may be read again.
        raise
    wanted = {each for each in ranges if each[1]}
    found = {each: b"" for each in ranges if not each[1]}
    found |= self._kept(file, wanted)
    for start, stop, members in _joined(wanted - found.keys()):
      content = self._fetch(file, start, stop - start)
      for offset, size in members:
        found[offset, size] = content[offset - start : offset - start + size]
        self._keep(file, offset, found[offset, size])
    return [found[each] for each in ranges]

  def opened(self, file: str) -> io.BufferedReader:
    """Opens a file to be read front to back; after a fault a server is asked again for what is still missing.

    Raises:
      As `read` does, and so do the reads of the stream.
    """
    if not scheme(file):
      return open(file, "rb", buffering=1 << 20)
    size = self.facts(file).size
    return io.BufferedReader(_Stream(functools.partial(self._fetch, file), size), BLOCK)

  def local_copy(self, file: str) -> Path:
    """Returns a path of this machine with the content of a file, which is itself where it is on this machine.

    A remote file is copied into the folder of the cache, once for all processes and beyond the bytes of the cache, and
    again when it has changed or its server does not tell versions apart.

    Raises:
      As `read` does.
      UserError: if the folder cannot be written, or the file changes meanwhile.
    """
    if not scheme(file):
      return Path(file)
    folder = paths.folder_to_write("data.cache_dir", self._folder) / "copies"
    folder.mkdir(parents=True, exist_ok=True)
    facts = self.facts(file)
    digest = hashlib.sha256(f"{file}\0{facts.stamp}".encode(errors="surrogateescape")).hexdigest()[:32]
    # The ending stays, by which readers know formats.
    path = folder / f"{digest}{PurePosixPath(urlsplit(file).path).suffix}"
    with cache.locked(folder / f".{digest}.lock"):
      if not (facts.stamp and path.is_file() and path.stat().st_size == facts.size):
        partial = paths.beside(path, "partial")
        with self.opened(file) as remote, open(partial, "wb") as copy:
          shutil.copyfileobj(remote, copy, BLOCK)
          copy.flush()
          os.fsync(copy.fileno())
        if partial.stat().st_size != facts.size:
          raise UserError(f"{file} changed while it was copied: start again when it is complete")
        partial.replace(path)
    return path

  def _fetch(self, file: str, offset: int, size: int) -> bytes:
    known = self._known.get(file)
    if known and offset + size > known.size:
      raise servers.too_short(file, known.size, offset + size)
    stamp, seconds = known.stamp if known else "", self._seconds + size / SLOWEST
    content = self._answer(file, lambda: servers.fetch(file, offset, size, stamp, seconds))
    self.tally.add("bytes", size)
    return content

  def _answer(self, file: str, ask: Callable[[], Answer]) -> Answer:
    """Asks a server until it answers, or the delays are used up."""

    def attempt() -> Answer | Exception:
      self.tally.add("requests")
      try:
        return ask()
      except Fault as fault:
        self.tally.add(fault.kind)
        raise
      except (FileNotFoundError, PermissionError) as error:
        return error  # Raised here, it would be taken for one that another attempt may mend.

    try:
      answer = retried(attempt, self._delays)
    except Fault as fault:
      # Not an OSError, which whoever reads a record would try again as often.
      raise UserError(
        f"{file} cannot be read, after {len(self._delays) + 1} attempts ({fault}): see to its server or the network,"
        " and run the same command again"
      ) from fault
    if isinstance(answer, Exception):
      raise answer
    return answer

  def _kept(self, file: str, ranges: Iterable[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
    """Returns what the cache has of the ranges."""
    key = self._key(file)
    if key is None:
      return {}
    found = {(offset, size): self._ranges.get(f"{key}\0{offset}\0{size}", size) for offset, size in ranges}
    kept = {each: content for each, content in found.items() if content is not None}
    self.tally.add("hits", len(kept))
    self.tally.add("misses", len(found) - len(kept))
    return kept

  def _keep(self, file: str, offset: int, content: bytes) -> None:
    key = self._key(file)
    if key is not None:
      self._ranges.put(f"{key}\0{offset}\0{len(content)}", content)

  def _key(self, file: str) -> str | None:
    """Returns the key of a file in the cache; None without a cache, or where a server does not tell versions apart."""
    if self._ranges is None:
      return None
    known = self._known.get(file) or self.facts(file)
    return f"{file}\0{known.stamp}" if known.stamp else None


class _LocalFile:
  """An open file of this machine, closed when nobody holds it any more, so that no thread reads a number used anew."""

  def __init__(self, file: str):
    self._file, self._number = file, os.open(file, os.O_RDONLY | os.O_CLOEXEC)

  def read(self, offset: int, size: int) -> bytes:
    """Returns exactly the bytes of a range."""
    parts, missing = [], size
    while missing:
      part = os.pread(self._number, missing, offset + size - missing)
      if not part:
        raise servers.too_short(self._file, os.fstat(self._number).st_size, offset + size)
      parts.append(part)
      missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def __del__(self, close=os.close):  # When Python ends, modules may be gone before this is.
    if hasattr(self, "_number"):
      close(self._number)


class _Stream(io.RawIOBase):
  """A remote file as a stream, of which each read is one request."""

  def __init__(self, fetch: Callable[[int, int], bytes], size: int):
    self._fetch, self._size, self._at = fetch, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
    if at < 0:
      raise ValueError(f"the position {at} is before the start")
    self._at = at
    return at

  def readinto(self, buffer) -> int:
    size = max(0, min(len(buffer), BLOCK, self._size - self._at))
    if size:
      buffer[:size] = self._fetch(self._at, size)
      self._at += size
    return size

  def readall(self) -> bytes:
    # The one of the base class asks for a few KiB at a time.
    parts = []
    while self._at < self._size:
      parts.append(self._fetch(self._at, min(BLOCK, self._size - self._at)))
      self._at += len(parts[-1])
    return b"".join(parts)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int, list[tuple[int, int]]]]:
  """Returns (start, stop, ranges within) of what is asked for at once."""
  groups: list[tuple[int, int, list[tuple[int, int]]]] = []
  for offset, size in sorted(ranges):
    if groups:
      start, stop, members = groups[-1]
      if offset - stop < NEAR and max(stop, offset + size) - start <= MOST_AT_ONCE:
        members.append((offset, size))
        groups[-1] = start, max(stop, offset + size), members
        continue
    groups.append((offset, offset + size, [(offset, size)]))
  return groups
