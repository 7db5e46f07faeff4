"""Reads the files that checkpoints come in: safetensors, NumPy's npz, and PyTorch's without PyTorch."""

import contextlib
import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from contrastive_jax import paths
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.interop import file_kinds, torch_files

# What the readers raise over bytes that are no checkpoint; a pickle can fail in any way a program can.
_DAMAGED = (
  *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, MemoryError),
  *(NotImplementedError, RecursionError, SafetensorError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
)


def read(path: Path, suffixes: Iterable[str] = ()) -> dict[str, np.ndarray]:
  """Reads the arrays of a file; floating-point ones become float32.

  Args:
    path: path of the file.
    suffixes: the suffixes of the formats that are expected; empty stands for all that this library reads.

  Raises:
    UserError: if the file is not there, is damaged, is of another format, or asks for code to be run.
  """
  known = tuple(suffixes) or tuple(_READERS)
  if path.is_dir():
    raise UserError(f"{path} is a folder: name a file in it that ends in {', '.join(known)}")
  if not path.is_file():
    raise UserError(f"{path} does not exist: name a file that ends in {', '.join(known)}")
  file_kinds.require_readable(path, known)
  try:
    arrays = dict(_READERS[path.suffix](path))
  except UserError:
    raise
  except _DAMAGED as error:
    raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
  if not arrays:
    raise UserError(f"{path} holds no arrays: give the file of the weights")
  # Numbers beyond float32 become infinite, and are refused by their names.
  with np.errstate(over="ignore", invalid="ignore"):
    return {name: array.astype(np.float32) if _is_float(array) else array for name, array in arrays.items()}


def read_folder(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Reads the arrays of the first of these files that is in a folder, or of the shards that its index lists.

  Args:
    folder: the folder of a model.
    names: names of files, the preferred first.

  Raises:
    UserError: if there is none.
  """
  for name in names:
    if (folder / name).is_file():
      return read(folder / name)
    index = folder / f"{name}.index.json"
    if index.is_file():
      return _read_shards(folder, index)
  raise UserError(
    f"{folder} has no weights: it needs one of {', '.join(names)}{file_kinds.conversion_of_folder(folder)}"
  )


def _read_shards(folder: Path, index: Path) -> dict[str, np.ndarray]:
  listed = read_object(index).get("weight_map")
  if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
    raise UserError(f"{index} has no weight_map that names the file of each weight: copy it again")
  shards = sorted(set(listed.values()))
  odd = [shard for shard in shards if Path(shard).name != shard]
  if odd:
    raise UserError(f"{index} names the file {odd[0]!r}, which is not in its folder: copy it again")
  arrays: dict[str, np.ndarray] = {}
  for shard in shards:
    found = read(folder / shard)
    other = [name for name in found if listed.get(name) != shard]
    absent = [name for name, file in listed.items() if file == shard and name not in found]
    if other or absent:
      what = f"also holds {other[0]}" if other else f"does not hold {absent[0]}"
      raise UserError(f"{folder / shard} {what}, otherwise than {index.name} says: copy both again")
    arrays |= found
  return arrays


def split_spec(spec: str, kinds: Iterable[str], what: str) -> tuple[str, Path]:
  """Splits the argument of a command into the kind of weights and the path where they lie.

  Args:
    spec: the argument, "KIND:PATH".
    kinds: the kinds that are known.
    what: the word for the path in errors, "PATH" or "FOLDER".

  Raises:
    UserError: if it is not of this form, or the kind is unknown.
  """
  kind, colon, path = spec.partition(":")
  if not colon:
    raise UserError(f"'{spec}' must be KIND:{what}, KIND one of {', '.join(kinds)}")
  require_known("the kind of weights", kind, kinds)
  return kind, paths.typed(kind, path)


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: if the file is not there, is not JSON, or names something twice.
  """
  if not path.is_file():
    raise UserError(f"{path} does not exist: a model of others comes in a folder with its config")
  try:
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
  except (OSError, ValueError, RecursionError) as error:
    what = file_kinds.foreign_text(path) or f"is not JSON ({_first_line(error)}): copy it again"
    raise UserError(f"{path} {what}") from error


def read_object(path: Path) -> dict[str, Any]:
  """Reads a JSON file of options.

  Raises:
    UserError: as in `read_json`, and if the file holds something else than an object.
  """
  found = read_json(path)
  if not isinstance(found, dict):
    raise UserError(f"{path} holds {str(found)[:40]!r} and not an object with options: copy it again")
  return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Refuses an object that names something twice: readers differ in which of the two values they take."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
  return found


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def require_new(folder: Path) -> None:
  """Raises a `UserError` where something lies that a new folder would be mixed with."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f"{folder} is there already: name a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """Makes a folder that is there whole or not at all: yields one beside it, which is renamed at the end.

  Raises:
    UserError: if the folder is there and not empty.
  """
  require_new(folder)
  folder = folder.resolve()
  partial = paths.beside(folder, "partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.replace(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays for PyTorch's readers.

  Args:
    path: path of the file.
    arrays: the arrays by name; scalars keep their shape.
  """
  save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path, metadata={"format": "pt"})


def _is_float(array: np.ndarray) -> bool:
  return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  with safe_open(path, framework="numpy") as file:
    for name in file.keys():  # noqa: SIM118 - not a mapping
      try:
        yield name, file.get_tensor(name)
      except AttributeError as error:
        kind = file.get_slice(name).get_dtype()
        raise UserError(f"{path} holds {name} in numbers of the type {kind}: save the weights as float32") from error


def _npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  with np.load(path, allow_pickle=False) as file:
    for name in file.files:
      array = np.asarray(file[name])
      # NumPy writes what it has no name for, bfloat16, as two raw bytes.
      yield name, array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, np.ndarray]]]] = {
  ".safetensors": _safetensors,
  ".npz": _npz,
  **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), torch_files.read),
}
