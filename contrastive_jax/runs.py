"""The files of a run directory: how they are written, and how they are read when something has damaged them.

A run directory holds `config.json`, `tokenizer/`, `checkpoints/<step>/`, `metrics.jsonl`, `sample_ids.jsonl`, event
files of TensorBoard, `sessions.json`, `eval/<set>@<step>.json`, `report.html`, while a command works on it `run.lock`,
after records that cannot be read `bad_records.jsonl`, and after a step that was not finite `nonfinite_ids.json`.

Files are written beside their place and renamed into it, so that none is ever there by half.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax import paths
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
  """SHA-256 of JSON, whatever the order of its keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> Path:
  """Writes `config.json` with a digest of itself, by which `read_config` notices damage."""
  content = json.loads(json.dumps(config))
  return write_atomically(
    Path(workdir) / "config.json", json.dumps({**content, "digest": digest(content)}, indent=2) + "\n"
  )


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The config that a run was started with; runs of older versions carry no digest.

  Raises:
    UserError: if the directory is not a run or its `config.json` is damaged.
  """
  path = Path(workdir) / "config.json"
  if not path.is_file():
    raise UserError(f"{workdir} is not a run directory: it has no config.json")
  config = read_json(path)
  if not isinstance(config, dict):
    raise UserError(f"{path} is damaged: it holds no JSON object; put back the original")
  expected = config.pop("digest", None)
  if expected is not None and digest(config) != expected:
    raise UserError(
      f"{path} is not what was written: its digest differs; put back the original, or delete its line 'digest' if you"
      " changed the file on purpose"
    )
  return config


def read_json(path: str | os.PathLike) -> Any:
  """The content of a JSON file.

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


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """Sound rows of a JSONL file, each as its bytes and its content; how many lines are broken is said in one warning."""
  broken = []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if line.endswith(b"\n") and isinstance(row, dict) and type(row.get("step")) is int:
        yield line, row
        continue
    broken.append(number)
  if broken:
    log.warning("%s: left out %d broken lines, the first of them line %d.", path, len(broken), broken[0])


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Sound rows of a JSONL file; empty when there is none."""
  return [row for _, row in json_lines(path)] if path.exists() else []


class JsonLines:
  """A file of one JSON object a line, which a restart cuts back to the step it restored.

  A row that cannot be written never raises: it waits in memory and is written before the next one. Beyond
  `PENDING_BYTES` the oldest waiting rows are dropped and counted.

  Attributes:
    dropped: rows that were lost.
  """

  def __init__(self, path: Path, *, restored_step: int):
    """Opens `path` for appending, without the rows after `restored_step` and without broken lines."""
    self._path = path
    self._pending: list[bytes] = []
    self._failed = False
    self.dropped = 0
    kept = [line for line, row in json_lines(path) if row["step"] <= restored_step] if path.exists() else []
    _replace(path, b"".join(kept))
    self._size = sum(map(len, kept))

  def write(self, row: Mapping[str, Any]) -> None:
    self._pending.append(json.dumps(row).encode() + b"\n")
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
