"""What a person typed as a path, made into a path that works everywhere or refused in one sentence.

Every command takes its places from here, before it computes anything.
"""

import errno
import glob
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from contrastive_jax.errors import UserError


def typed(field: str, text: str | os.PathLike) -> Path:
  """Returns the path that a person meant, with `~` expanded as a shell does; a relative one stays so.

  Args:
    field: flag or config field that holds it, such as "--workdir".
    text: what was typed; relative paths start at the current directory.

  Raises:
    UserError: if the text is empty or blank, holds a NUL, has a name that is too long, names no known user, or leads
      round in a circle of links.
  """
  text = os.fspath(text)
  if not text.strip():
    raise UserError(f"{field}={text!r} is empty: name a path")
  if "\0" in text:
    raise UserError(f"{field}={text!r} holds a NUL character, which no path may: leave it out")
  try:
    path = Path(text).expanduser()
  except RuntimeError:
    raise UserError(f"{field}={text} names a home folder that does not exist: write the whole path") from None
  if not os.path.lexists(path) and ".." in path.parts:
    path = Path(os.path.normpath(path))
  try:
    path.stat()
  except OSError as error:
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
      raise UserError(f"{field}={_short(text)} cannot be used ({error.strerror}): name another path") from None
  except UnicodeEncodeError:
    raise UserError(f"{field}={text!r} cannot be a path in this locale: name another, or set LC_ALL=C.UTF-8") from None
  return path


def folder_to_write(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a folder that exists and can be written, or can be made; makes nothing.

  Raises:
    UserError: if the path, or one above it, is a file, a dangling link or not writable.
  """
  path = typed(field, text)
  _require_readable_by_tensorstore(field, text, path)
  if path.is_dir():
    _require_writable(field, text, path)
  elif os.path.lexists(path):
    what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a file"
    raise UserError(f"{field}={_short(text)} is {what}, and a folder is needed: name another path")
  else:
    _require_place(field, text, path)
  return path


def file_to_write(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a file that can be written, whether or not it is there; makes nothing.

  Raises:
    UserError: if the path is a folder or a dangling link, or its folder cannot be made or written.
  """
  path = typed(field, text)
  if path.is_dir() or os.fspath(text).endswith(os.sep):
    raise UserError(f"{field}={_short(text)} is a folder, and a file is needed: name a file in it")
  if path.is_symlink() and not path.exists():
    raise UserError(f"{field}={_short(text)} is a link that leads nowhere: name another path")
  if path.exists() and not os.access(path, os.W_OK):
    raise UserError(f"{field}={_short(text)} cannot be written: name another path, or allow writing there")
  _require_place(field, text, path)
  return path


def run_to_read(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a run directory, which has a `config.json`.

  Raises:
    UserError: if there is none.
  """
  path = typed(field, text)
  _require_readable_by_tensorstore(field, text, path)
  if not (path / "config.json").is_file():
    why = "does not exist" if not path.exists() else "is a file" if path.is_file() else "has no config.json"
    raise UserError(f"{field}={_short(text)} is not a run directory ({why}): name one")
  return path


def files_below(folder: Path) -> Iterator[Path]:
  """Yields the files below a folder. Linked folders are followed, each place once: links may lead round in a circle."""
  seen: set[tuple[int, int]] = set()

  def walk(current: Path) -> Iterator[Path]:
    about = current.stat()
    if (about.st_dev, about.st_ino) in seen:
      return
    seen.add((about.st_dev, about.st_ino))
    linked = []
    for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
      path = current / entry.name
      if entry.is_dir(follow_symlinks=False):
        yield from walk(path)
      elif entry.is_dir():
        linked.append(path)
      elif entry.is_file():
        yield path
    # After the others, so that a folder is found under its own name and not under that of a link beside it.
    for path in linked:
      yield from walk(path)

  yield from walk(folder)


def as_id(name: str) -> str:
  """Returns a file's name as text: bytes that are not UTF-8 and line breaks become `%XX`, and so does `%` beside them.

  A name of ordinary characters is its own id, and no two names share one: `urllib.parse.unquote_to_bytes` undoes an id
  that was changed.
  """
  raw = os.fsencode(name)
  try:
    plain = raw.decode()
  except UnicodeDecodeError:
    plain = None
  if plain is not None and not re.search(r"[\r\n]|%[0-9A-F]{2}", plain):
    return plain
  text = raw.replace(b"%", b"%25").replace(b"\r", b"%0D").replace(b"\n", b"%0A").decode(errors="surrogateescape")
  return re.sub("[\udc80-\udcff]", lambda found: f"%{ord(found[0]) - 0xDC00:02X}", text)


def _require_place(field: str, text: str | os.PathLike, path: Path) -> None:
  """Refuses a path whose folders above it cannot be made."""
  above = path.absolute().parent
  while not os.path.lexists(above):
    above = above.parent
  if not above.is_dir():
    what = "a link that leads nowhere" if above.is_symlink() and not above.exists() else "not a folder"
    raise UserError(f"{field}={_short(text)} cannot be made, since {above} is {what}: name another path")
  _require_writable(field, text, above)


def _require_writable(field: str, text: str | os.PathLike, folder: Path) -> None:
  try:
    # Only an attempt tells, whether permissions, a read-only mount or the kind of file system stand in the way.
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise UserError(
      f"{field}={_short(text)} cannot be written, since {folder} takes no file ({error.strerror}): name another path"
    ) from None


def _require_readable_by_tensorstore(field: str, text: str | os.PathLike, path: Path) -> None:
  """Refuses what TensorStore, which reads and writes the arrays of checkpoints, takes for another path."""
  if "\\" in os.fspath(path.absolute()):
    raise UserError(f"{field}={_short(text)} has a backslash in its path, which checkpoints cannot have: rename it")
  try:
    os.fspath(path.absolute()).encode()
  except UnicodeEncodeError:
    raise UserError(f"{field}={text!r} is not UTF-8, which paths of checkpoints must be: rename it") from None


def _short(text: str | os.PathLike) -> str:
  text = os.fspath(text)
  shown = text if len(text) <= 120 else f"{text[:60]}...{text[-20:]}"
  return shown if shown.isprintable() else repr(shown)


def read_names_literally() -> None:
  """Lets Orbax find checkpoints below folders whose names hold `[`, `*` or `?`.

  `epath.Path.glob`, with which Orbax looks for the files of a checkpoint, hands its own path to `glob.glob` as part of
  the pattern: below `again[1]` it looks for `again1` and finds nothing. Only what the caller asks for is a pattern.
  """
  kind = type(epath.Path("/"))
  if getattr(kind.glob, "literal_root", False):
    return
  original = kind.glob

  def escaped(self, pattern: str):
    root = os.fspath(self)
    if "://" in root or glob.escape(root) == root:
      return original(self, pattern)
    return (self / found for found in glob.glob(pattern, root_dir=root))

  escaped.literal_root = True
  kind.glob = escaped
