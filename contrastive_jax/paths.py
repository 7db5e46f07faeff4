"""Makes what a person typed as a path into a path that works everywhere, or refuses it in one sentence.

Every command takes its places from here, before it computes anything.
"""

import glob
import hashlib
import os
import re
import stat
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from contrastive_jax.errors import UserError

# Of a name that is written beside another: most file systems allow 255.
_NAME_BYTES = 200


def typed(field: str, text: str | os.PathLike) -> Path:
  """Returns the path that a person meant, with `~` expanded as a shell does; a relative one stays so.

  `file:///folder` is the path `/folder`. Addresses of other kinds, such as `gs://bucket`, are refused.

  Args:
    field: flag or config field that holds it, such as "--workdir".
    text: what was typed; relative paths start at the current directory.

  Raises:
    UserError: if the text is empty or blank, holds a NUL, has a name that is too long, names no known user, or leads
      round in a circle of links, lies below a folder that may not be entered, or is an address of another machine.
  """
  if not isinstance(text, str | os.PathLike) or not isinstance(os.fspath(text), str):
    raise UserError(f"{field}={text!r} is a {type(text).__name__} and no path: name one as text or Path")
  text = os.fspath(text)
  if not text.strip():
    raise UserError(f"{field}={text!r} is empty: name a path")
  if "\0" in text:
    raise UserError(f"{field}={text!r} holds a NUL character, which no path may: leave it out")
  local = _without_scheme(field, text)
  try:
    path = Path(local).expanduser()
  except RuntimeError:
    raise UserError(f"{field}={text} names a home folder that does not exist: write the whole path") from None
  if not os.path.lexists(path) and ".." in path.parts:
    path = Path(os.path.normpath(path))
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    pass  # Whether it has to be there is for the caller to say.
  except OSError as error:
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

  A link to a file gives the path of that file, so that the link stays when the file is replaced.

  Raises:
    UserError: if the path is a folder, a dangling link or a device, or its folder cannot be made or written.
  """
  path = typed(field, text)
  if path.is_dir() or os.fspath(text).endswith(os.sep):
    raise UserError(f"{field}={_short(text)} is a folder, and a file is needed: name a file in it")
  if path.is_symlink() and not path.exists():
    raise UserError(f"{field}={_short(text)} is a link that leads nowhere: name another path")
  if path.exists() and not stat.S_ISREG(path.stat().st_mode):
    raise UserError(f"{field}={_short(text)} is no ordinary file and must not be replaced: name another path")
  if path.is_symlink():
    path = path.resolve()
  if path.exists() and not os.access(path, os.W_OK):
    raise UserError(f"{field}={_short(text)} cannot be written: name another path, or allow writing there")
  _require_place(field, text, path)
  return path


def run_to_write(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a run directory that can be written, whether or not it is there; makes nothing.

  Raises:
    UserError: as `folder_to_write` does, for the folder or for those in it that a run goes on writing to, and for a
      bucket, of which a run can only keep a mirror.
  """
  if re.match(r"(gs|s3)://", str(text), re.IGNORECASE):
    raise UserError(
      f"{field}={_short(text)} is a bucket, and a run works in a folder of this machine: name one, and let"
      f" --config.workdir_mirror={_short(text)} keep the bucket like it"
    )
  path = folder_to_write(field, text)
  for inner in (path / "checkpoints", path / "eval"):
    folder_to_write(field, inner)
  return path


def run_to_read(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a run directory, which has a `config.json`.

  Raises:
    UserError: if there is none.
  """
  path = typed(field, text)
  _require_readable_by_tensorstore(field, text, path)
  if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
    raise UserError(f"{field}={_short(text)} may not be read by this user: allow reading there")
  if not (path / "config.json").is_file():
    why = "does not exist" if not path.exists() else "is a file" if path.is_file() else "has no config.json"
    raise UserError(f"{field}={_short(text)} is not a run directory ({why}): name one")
  return path


def files_below(folder: Path) -> Iterator[Path]:
  """Yields the files below a folder, and links that lead nowhere, which whoever reads them is to name.

  Linked folders are followed, each place once: links may lead round in a circle.

  Raises:
    UserError: if one of the folders may not be read.
  """
  seen: set[tuple[int, int]] = set()

  def walk(current: Path) -> Iterator[Path]:
    stat = current.stat()
    if (stat.st_dev, stat.st_ino) in seen:
      return
    seen.add((stat.st_dev, stat.st_ino))
    linked = []
    try:
      entries = sorted(os.scandir(current), key=lambda entry: entry.name)
    except OSError as error:
      raise UserError(f"{_short(current)} cannot be read ({error.strerror}): allow reading there") from None
    for entry in entries:
      path = current / entry.name
      if entry.is_dir(follow_symlinks=False):
        yield from walk(path)
      elif path.is_dir():  # Not by the entry, which raises for a link in a circle.
        linked.append(path)
      elif path.is_file() or (entry.is_symlink() and not path.exists()):
        yield path
    # After the others, so that a folder is found under its own name and not under that of a link beside it.
    for path in linked:
      yield from walk(path)

  yield from walk(folder)


def beside(path: Path, end: str) -> Path:
  """Returns the hidden path next to `path` under which its content is written before it is renamed.

  Args:
    path: the path that is to be written. Its name may be as long as the file system allows.
    end: the end of the hidden name.
  """
  name = os.fsencode(path.name)
  short = path.name if len(name) + len(end) < _NAME_BYTES else hashlib.sha256(name).hexdigest()[:16]
  return path.with_name(f".{short}.{end}")


def is_writable(folder: Path) -> bool:
  """Says whether files can be made in a folder, or in the nearest one above it where it is not there yet."""
  try:
    folder_to_write("", folder)
  except UserError:
    return False
  return True


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


def _without_scheme(field: str, text: str) -> str:
  """Returns the path in the address of a file, and any other text as it is."""
  if re.match(r"file:/", text, re.IGNORECASE):
    address = re.fullmatch(r"file:(?://(?:localhost)?)?(/.*)", text, re.IGNORECASE | re.DOTALL)
    if not address:
      raise UserError(f"{field}={_short(text)} names a file of another machine: write file:///folder or a plain path")
    return urllib.parse.unquote(address[1], errors="surrogateescape")
  scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
  if scheme:
    raise UserError(
      f"{field}={_short(text)} is an address of the kind {scheme[1]}://, and only folders of this machine can be used: "
      f"mount it as a folder and name that, or write ./{_short(text)} for a folder that is really called so"
    )
  return text


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
  if any(part.endswith("gs:") for part in path.absolute().parts):
    raise UserError(f"{field}={_short(text)} has a folder that ends in 'gs:', which stands for a bucket: rename it")
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
