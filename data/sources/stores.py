"""Faults in the files of a TFDS set, told apart: of a record, of a shard, or of the whole folder."""

import os
import pathlib
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError, undecodable

# Shards that are all opened before a run begins; of more, a damaged one is met when it is read.
_MOST_OPENED = 256
_MOST_LISTED = 8
# What riegeli, which reads ArrayRecord, says when the file system and not the file is to blame.
_PASSING = ("unavailable", "deadline", "input/output error", "stale file", "too many open files", "timed out")


def read(records: Any, index: int, name: str) -> Any:
  """Reads a record of one of TFDS's data sources.

  Args:
    records: the records that `builder.as_data_source` returned.
    index: number of the record.
    name: name of the set.

  Raises:
    DecodeError: if its bytes are damaged.
    UserError: if the shard that holds it cannot be opened.
    OSError: if reading may succeed another time.
  """
  reader = getattr(records, "data_source", None)
  if hasattr(reader, "_ensure_reader_exists"):
    _open_shard(reader, reader._reader_idx_and_position(index)[0], name, "")
  try:
    return records[index]
  except (DecodeError, UserError, OSError):
    raise
  except Exception as error:  # ArrayRecord raises RuntimeError, the parsers of records all kinds of error.
    if _is_passing(error):
      raise OSError(f"{shard_of(records, index)}: {error}") from error
    raise undecodable(error, "record") from error


def shard_of(records: Any, index: int) -> str:
  """Returns the file of a record, where the format tells: ArrayRecord does."""
  reader = getattr(records, "data_source", None)
  if not hasattr(reader, "_read_instructions"):
    return ""
  return os.path.basename(reader._read_instructions[reader._reader_idx_and_position(index)[0]].filename)


def check_shards(records: Any, name: str, command: str) -> None:
  """Refuses a set of which a shard is missing, empty or cannot be opened.

  Args:
    records: the records that `builder.as_data_source` returned.
    name: name of the set.
    command: the command that prepares it.

  Raises:
    UserError: if there is such a shard, with its file and what was found there.
  """
  reader = getattr(records, "data_source", None)
  shards = getattr(reader, "_read_instructions", ())
  for number, shard in enumerate(shards):
    if len(shards) <= _MOST_OPENED:
      _open_shard(reader, number, name, command)
    elif not os.path.isfile(shard.filename):
      raise _damaged(shard.filename, name, command, "the file is missing")


def unopened(name: str, data_dir: str, error: Exception, command: str) -> UserError:
  """Makes the sentence for a set that TFDS cannot open: whether it is there, and what was found.

  Args:
    name: name of the set.
    data_dir: TFDS's directory of sets.
    error: the error that TFDS raised.
    command: the command that prepares the set.
  """
  if "Parsing builder name" in str(error):
    return UserError(f"{name!r} is no name of a TFDS set: write name, name/config or name/config:1.0.0")
  folder = pathlib.Path(data_dir) / name.partition(":")[0]
  if not folder.is_dir():
    return UserError(f"the TFDS set {name!r} is not in {data_dir}, prepare it with: {command}")
  said = " ".join(str(error).split())[:200]
  return UserError(
    f"the TFDS set {name!r} cannot be opened: {_what_is_in(folder)} ({type(error).__name__}: {said}); copy it again"
    f" with its hidden files, or prepare it with: {command}"
  )


def _open_shard(reader: Any, number: int, name: str, command: str) -> None:
  shard = reader._read_instructions[number]
  try:
    reader._ensure_reader_exists(number)
    opened = reader._readers[number]
    held = opened.num_records() if hasattr(opened, "num_records") else None
  except PermissionError as error:
    raise _damaged(shard.filename, name, command, "it may not be read") from error
  except Exception as error:
    if os.path.isfile(shard.filename) and _is_passing(error):
      raise OSError(f"{shard.filename}: {error}") from error
    raise _damaged(shard.filename, name, command, _state(shard.filename)) from error
  if held is not None and held < shard.start + shard.num_records:
    expected = f"{held} records where dataset_info.json counts {shard.start + shard.num_records}"
    raise _damaged(shard.filename, name, command, f"it holds {expected}")


def _damaged(file: str, name: str, command: str, what: str) -> UserError:
  again = f", or prepare the set again with: {command}" if command else ""
  return UserError(f"{file} of the TFDS set {name!r} cannot be read, {what}: copy it again{again}")


def _state(file: str) -> str:
  if not os.path.isfile(file):
    return "the file is missing"
  if not os.access(file, os.R_OK):
    return "it may not be read"
  return f"it has {os.path.getsize(file):,} bytes and is cut or damaged"


def _is_passing(error: Exception) -> bool:
  said = str(error).lower()
  return (isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)) or any(
    words in said for words in _PASSING
  )


def _what_is_in(folder: pathlib.Path) -> str:
  try:
    # The version's folder is what matters; files lie beside folders only there.
    inside = sorted(folder.rglob("*"))
  except OSError as error:
    return f"{folder} cannot be listed ({error.strerror})"
  closed = next((path for path in inside if not os.access(path, os.R_OK)), None)
  if closed is not None:
    return f"{closed} may not be read"
  broken = next((path for path in inside if path.suffix == ".json" and not path.stat().st_size), None)
  if broken is not None:
    return f"{broken} is empty"
  for wanted in ("dataset_info.json", "features.json"):
    if inside and not any(path.name == wanted for path in inside):
      names = [path.relative_to(folder).as_posix() for path in inside]
      more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
      return f"{folder} holds {', '.join(names[:_MOST_LISTED])}{more} but no {wanted}"
  return f"{folder} holds {', '.join(path.name for path in sorted(folder.iterdir())[:_MOST_LISTED]) or 'nothing'}"
