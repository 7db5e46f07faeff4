"""The files of a run directory: how they are written, and how they are read when something has damaged them.

A run directory holds `config.json`, `tokenizer/`, `checkpoints/<step>/`, `metrics.jsonl`, `sample_ids.jsonl`, event
files of TensorBoard, `sessions.json`, `eval/<set>@<step>.json`, `report.html`, while a command works on it `run.lock`,
after records that cannot be read `bad_records.jsonl`, after a step that was not finite `nonfinite_ids.json`, and where
a mirror is kept `mirror/run.json`, the id by which the mirror knows the run.

Files are written beside their place and renamed into it, so that none is ever there by half. JSON objects hold a
"digest" of themselves and rows of JSONL files end with a "crc" of themselves. Those of older versions have neither.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax import paths, upgrades
from contrastive_jax.errors import UserError

log = logging.getLogger(__name__)

# Rows that wait in memory for a disk with room; of more than this the oldest are dropped.
PENDING_BYTES = 16 * 2**20


def write_atomically(path: str | os.PathLike, text: str) -> Path:
  """Writes UTF-8 text beside `path`, waits until it is on disk, and renames it into place."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Names of files that are not UTF-8 stand in texts as Python keeps them.
  _replace(path, text.encode("utf-8", errors="backslashreplace"))
  return path


def _replace(path: Path, content: bytes) -> None:
  partial = paths.beside(path, str(os.getpid()))
  try:
    with partial.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def write_folder(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
  """Has a folder written beside `path` and renames it into place; a writer that died leaves nothing at `path`."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = paths.beside(path, f"partial-{os.getpid()}")
  left_over = paths.beside(path, "partial-").name
  for other in path.parent.iterdir():
    if other.name.startswith(left_over):
      shutil.rmtree(other, ignore_errors=True)
  try:
    write(partial)
    for file in partial.rglob("*"):
      if file.is_file():
        with file.open("rb") as written:
          os.fsync(written.fileno())
    partial.replace(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return path


def digest(content: Any) -> str:
  """Computes the SHA-256 of JSON, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the object as JSON gives it back, with a digest of itself, by which `unsealed` notices damage."""
  plain = json.loads(json.dumps(content))
  return {**plain, "digest": digest(plain)}


def unsealed(content: Any) -> dict[str, Any]:
  """Returns the object without its digest; objects of older versions carry none.

  Raises:
    ValueError: if this is no object or not the one that was sealed; the message is the end of a sentence.
  """
  if not isinstance(content, dict):
    raise ValueError("it holds no JSON object")
  rest = {name: value for name, value in content.items() if name != "digest"}
  if "digest" in content:
    if digest(rest) != content["digest"]:
      raise ValueError("its digest differs")
  elif content and next(reversed(content.values())) == digest(dict(list(content.items())[:-1])):
    raise ValueError("the name of its digest differs")
  return rest


def write_object(path: str | os.PathLike, content: Mapping[str, Any], indent: int | None = 2) -> Path:
  """Writes a JSON object with a digest of itself, by which `read_object` notices damage; `indent` is that of `json`."""
  return write_atomically(path, json.dumps(sealed(content), indent=indent, ensure_ascii=False) + "\n")


def read_object(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the JSON object that `write_object` wrote, without its digest; files of older versions carry none.

  Raises:
    UserError: if the file is missing or damaged.
  """
  try:
    return unsealed(read_json(path))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(
      f"{path} is damaged, {error}: put back the original, or delete its line 'digest' if you changed the file on"
      " purpose"
    ) from None


def write_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> Path:
  """Writes `config.json`."""
  return write_object(Path(workdir) / "config.json", upgrades.stamped(config))


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the config that a run was started with, in today's form whatever version wrote it.

  Raises:
    UserError: if the directory is not a run, or its `config.json` is damaged or of a newer version.
  """
  path = Path(workdir) / "config.json"
  if not path.is_file():
    around = list(Path(workdir).absolute().parents)[:2]
    run = next((folder for folder in around if (folder / "config.json").is_file()), None)
    meant = f", but {run} has one (did you mean that?)" if run else ""
    raise UserError(f"{workdir} is not a run directory: it has no config.json{meant}")
  return upgrades.config(read_object(path), str(path))


def read_json(path: str | os.PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: if the file is missing or holds no JSON.
  """
  try:
    return json.loads(Path(path).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} is missing") from None
  except (ValueError, RecursionError) as error:
    reason = " ".join(str(error).split())[:100]
    raise UserError(f"{path} is damaged, it holds no JSON ({reason}); put back the original") from None


def json_line(row: Mapping[str, Any]) -> bytes:
  """Writes a row of a JSONL file, which ends with a CRC-32 of the rest: `{"step": 3, "crc": "0f1e2d3c"}`."""
  fields = json.dumps(row).encode()[:-1]
  return fields + _ending(fields)


def _ending(fields: bytes) -> bytes:
  return b', "crc": "%08x"}\n' % zlib.crc32(fields)


_ENDING_BYTES = len(_ending(b""))


def _is_whole(line: bytes) -> bool:
  """Says whether a line is as it was written; lines of older versions carry no CRC and pass."""
  expected, found = _ending(line[:-_ENDING_BYTES]), line[-_ENDING_BYTES:]
  # A CRC that does not fit and a damaged name of the field both leave most of the other bytes as they were.
  alike = sum(one == other for one, other in zip(expected, found, strict=False))
  return found == expected or alike < _ENDING_BYTES // 2


def json_lines(path: Path, key: str = "step", kind: type = int) -> Iterator[dict[str, Any]]:
  """Reads the sound rows of a JSONL file, without their CRC; one warning tells how many lines are damaged.

  Args:
    path: path of the file.
    key: name of a field that every row has.
    kind: the type of its value.
  """
  broken = []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if line.endswith(b"\n") and isinstance(row, dict) and type(row.get(key)) is kind and _is_whole(line):
        row.pop("crc", None)
        yield row
        continue
    broken.append(number)
  if broken:
    log.warning("%s: left out %d damaged lines, the first of them line %d.", path, len(broken), broken[0])


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Reads the sound rows of a JSONL file; there are none when there is no file."""
  return list(json_lines(path)) if path.exists() else []


class JsonLines:
  """A file of one JSON object a line, which a restart cuts back to the step it restored.

  A row that cannot be written never raises: it waits in memory and is written before the next one. Beyond
  `PENDING_BYTES` the oldest waiting rows are dropped and counted.

  Attributes:
    dropped: number of rows that were lost.
  """

  def __init__(self, path: Path, *, restored_step: int):
    """Opens `path` for appending, without the rows after `restored_step` and without damaged lines."""
    self._path = path
    self._pending: list[bytes] = []
    self._failed = False
    self.dropped = 0
    kept = [json_line(row) for row in read_json_lines(path) if row["step"] <= restored_step]
    _replace(path, b"".join(kept))
    self._size = sum(map(len, kept))

  def write(self, row: Mapping[str, Any]) -> None:
    self._pending.append(json_line(row))
    self._flush()

  def _flush(self) -> None:
    try:
      # Opened each time: a descriptor of a deleted file would take rows that nobody ever sees. A part of a row that an
      # earlier failure left behind is cut off.
      with open(os.open(self._path, os.O_WRONLY), "wb", buffering=0) as file:
        file.truncate(self._size)
        file.seek(self._size)
        while self._pending:
          content = self._pending[0]
          if file.write(content) != len(content):
            raise OSError("a row was written in part")
          self._size += len(content)
          del self._pending[0]
      self._failed = False
    except OSError as error:
      if not self._failed:
        log.warning("%s cannot be written (%s): rows wait in memory until it can.", self._path, error.strerror or error)
      self._failed = True
      while sum(map(len, self._pending)) > PENDING_BYTES:
        del self._pending[0]
        self.dropped += 1

  def close(self) -> None:
    """Writes what still waits and says how many rows were lost."""
    self._flush()
    lost = self.dropped + len(self._pending)
    if lost:
      log.warning("%s: %d rows could not be written and are lost.", self._path, lost)
