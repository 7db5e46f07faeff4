"""Folders in object stores, or of this machine, through fsspec: the few calls that mirrors and downloads make.

Addresses are `s3://bucket/folder`, `gs://bucket/folder`, `https://host/file` for reading, and paths of folders. Keys,
regions and endpoints are those that the clients of the stores take from the environment.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from contrastive_jax import paths, runs
from contrastive_jax.bad_records import RETRY_DELAYS
from contrastive_jax.errors import UserError

log = logging.getLogger(__name__)

# What each kind of address needs beside fsspec. The clients are optional: nothing else asks for them.
_CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
WRITABLE, WEB = ("s3", "gs"), ("http", "https")
# What stores say of a version of a file: some its checksum, others a number or a time.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified", "updated", "mtime")


def scheme(text: str | os.PathLike) -> str:
  """Returns the kind of an address, such as "s3"; empty for paths, which `file:///folder` is as well."""
  found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", os.fspath(text))
  return found[1].lower() if found and found[1].lower() != "file" else ""


class Store:
  """One folder. Names within it are relative, with slashes.

  What a store or the way to it does not do raises whatever its client raises; `reason` makes words of it.

  Attributes:
    field: flag or config field that names the folder.
    address: the address of the folder.
  """

  def __init__(self, field: str, text: str | os.PathLike):
    """Opens no connection.

    Args:
      field: flag or config field that holds the address.
      text: the address.

    Raises:
      UserError: if no store has such an address, or the client of the store is not installed.
    """
    kind = scheme(text)
    self.field = field
    self._local, self._web = not kind, kind in WEB
    if self._local:
      self.address = str(paths.typed(field, text).absolute())
    else:
      place = os.fspath(text)[len(kind) :].removeprefix("://").strip("/")
      self.address = f"{kind}://{place}"
      if kind not in _CLIENTS:
        kinds = ", ".join(f"{known}://" for known in _CLIENTS)
        raise UserError(f"{field}={text} is an address of the kind {kind}://: name a folder, or one of {kinds}")
      if not place:
        raise UserError(f"{field}={text} names nothing: name a bucket and a folder in it, {kind}://bucket/folder")
      if kind in WRITABLE and re.search(r"[*?\[]", place):
        # The clients would take these for patterns, also of what is to be removed.
        raise UserError(f"{field}={text} has one of the characters *, ? and [ in it: name a place without them")
    if kind == "gs":
      # With each call gcsfs warns of a bucket whose layout it may not ask for, which only its own speed depends on.
      logging.getLogger("gcsfs").setLevel(logging.ERROR)
    try:
      self._files: Any = fsspec.filesystem(kind or "file", skip_instance_cache=True)
    except ImportError:
      raise UserError(f"{field}={text} needs the package {_CLIENTS[kind]}: pip install {_CLIENTS[kind]}") from None
    self._root = self.address if self._local else self._files._strip_protocol(self.address)

  def _at(self, name: str) -> str:
    return f"{self._root}/{name}" if name else self._root

  def read(self, name: str) -> bytes | None:
    """Returns the content of a file; None where there is none."""
    self._files.invalidate_cache()
    try:
      return self._files.cat_file(self._at(name))
    except FileNotFoundError:
      return None

  def write(self, name: str, text: str) -> None:
    """Writes UTF-8 text, which is there whole or not at all."""
    if self._local:
      runs.write_atomically(self._at(name), text)
    else:
      self._files.pipe_file(self._at(name), text.encode())

  def put(self, source: Path, name: str) -> None:
    """Copies a file of this machine there, whole or not at all."""
    if not self._local:
      self._files.put_file(os.fspath(source), self._at(name))
      return
    target = Path(self._at(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = paths.beside(target, str(os.getpid()))
    try:
      with source.open("rb") as content, partial.open("wb") as copy:
        shutil.copyfileobj(content, copy, 2**20)
        copy.flush()
        os.fsync(copy.fileno())
      partial.replace(target)
    finally:
      partial.unlink(missing_ok=True)

  def get(self, name: str, target: Path) -> None:
    """Copies a file from there to a path of this machine, whose folder is made.

    Raises:
      FileNotFoundError: if it is not there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    self._files.get_file(self._at(name), os.fspath(target))

  def files(self, folder: str = "") -> dict[str, Mapping[str, Any]]:
    """Returns what the store says of every file below a folder, by its name within that; nothing without a folder."""
    self._files.invalidate_cache()
    root = self._at(folder)
    try:
      found = self._files.find(root, detail=True)
    except FileNotFoundError:
      return {}
    # Names of folders, which some stores keep as empty files, are none.
    names = {path.removeprefix(root).lstrip("/"): about for path, about in found.items()}
    return {name: about for name, about in names.items() if name and not name.endswith("/")}

  def sizes(self, folder: str = "") -> dict[str, int]:
    """Returns the number of bytes of every file below a folder, by its name within that."""
    return {name: int(about["size"]) for name, about in self.files(folder).items()}

  def is_empty(self) -> bool:
    """Says whether nothing lies in the folder, without a list of all that does."""
    self._files.invalidate_cache()
    try:
      return not [path for path in self._files.ls(self._root, detail=False) if path.rstrip("/") != self._root]
    except FileNotFoundError:
      return True

  def about(self) -> Mapping[str, Any] | None:
    """Returns what the store says of the file that the address itself names; None where it is none."""
    self._files.invalidate_cache()
    try:
      found = self._files.info(self._root)
    except FileNotFoundError as error:
      # On the web fsspec says so of whatever went wrong, and keeps that as the cause.
      cause = error.__cause__
      if self._web and cause is not None and getattr(cause, "status", None) not in (404, 410):
        raise cause from None
      return None
    return found if found["type"] == "file" else None

  def remove(self, name: str) -> None:
    """Removes a file, or a folder with all that is below it, if it is there."""
    self._files.invalidate_cache()
    if self._files.exists(self._at(name)):
      self._files.rm(self._at(name), recursive=True)


def patiently(store: Store, call: Callable[[], Any], passes: tuple[type[Exception], ...] = ()) -> Any:
  """Returns what a call that asks a store gives, after further attempts where it fails.

  Args:
    store: the store, for messages.
    call: the call.
    passes: errors that tell something of what is there, which are raised at once as they are, as a `UserError` is.

  Raises:
    UserError: if the store does not allow it, or failed each time.
  """
  for delay in (*RETRY_DELAYS, None):
    try:
      return call()
    except (UserError, *passes):
      raise
    except Exception as error:  # Each client has errors of its own.
      if delay is None or isinstance(error, PermissionError | FileNotFoundError):
        raise UserError(
          f"{store.field}={store.address} cannot be used now ({reason(error)}): mend that, or name another place"
        ) from None
      log.warning("%s does not answer (%s): trying again.", store.address, reason(error))
      time.sleep(delay)


def version(about: Mapping[str, Any]) -> str:
  """Returns what tells a version of a file from the next, of what a store says of it: its size and what else it has."""
  return " ".join(str(about[name]) for name in ("size", *_VERSIONS) if about.get(name) is not None)


def reason(error: BaseException) -> str:
  """Returns in one line why a store did not do something."""
  said = " ".join(str(error).split()) or type(error).__name__
  return f"{type(error).__name__}: {said[:160]}"
