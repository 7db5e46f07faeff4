"""Arrays by name from the files that checkpoints come in: safetensors, NumPy's npz, and PyTorch's without PyTorch.

Nothing in a file is executed: PyTorch's files hold a pickle, of which only the names of tensors, their shapes and where
their numbers lie are read.
"""

import contextlib
import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from contrastive_jax import paths
from contrastive_jax.errors import UserError, require_known

_DTYPES = {
  "FloatStorage": np.dtype("<f4"),
  "DoubleStorage": np.dtype("<f8"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}
# What the readers raise over bytes that are no checkpoint; a pickle can fail in any way a program can.
_DAMAGED = (
  *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError),
  *(SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError),
)
# What a checkpoint with more than weights in it calls them, and what distributed training puts before their names.
_STATE, _PREFIX = "state_dict", "module."


def read(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a file; floating-point ones as float32.

  Raises:
    UserError: if the file is not there, is damaged, or asks for code to be run.
  """
  if not path.is_file():
    raise UserError(f"{path} does not exist: name a file that ends in {', '.join(_READERS)}")
  if path.suffix not in _READERS:
    raise UserError(f"{path} ends in '{path.suffix}': a checkpoint ends in {', '.join(_READERS)}")
  try:
    arrays = dict(_READERS[path.suffix](path))
  except _DAMAGED as error:
    raise UserError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error
  return {name: array.astype(np.float32) if _is_float(array) else array for name, array in arrays.items()}


def read_folder(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
  """The arrays of the first of these files that is in a folder, or of the shards that its index lists.

  Args:
    folder: of a model.
    names: of files, the preferred first.

  Raises:
    UserError: if there is none.
  """
  for name in names:
    if (folder / name).is_file():
      return read(folder / name)
    index = folder / f"{name}.index.json"
    if index.is_file():
      shards = sorted(set(read_json(index)["weight_map"].values()))
      return {key: array for shard in shards for key, array in read(folder / shard).items()}
  raise UserError(f"{folder} has no weights: it needs one of {', '.join(names)}")


def split_spec(spec: str, kinds: Iterable[str], what: str) -> tuple[str, Path]:
  """The kind of weights and where they lie.

  Args:
    spec: "KIND:PATH".
    kinds: that are known.
    what: the path is, for errors: "PATH" or "FOLDER".

  Raises:
    UserError: if it is not of this form, or the kind is unknown.
  """
  kind, colon, path = spec.partition(":")
  if not colon:
    raise UserError(f"'{spec}' must be KIND:{what}, KIND one of {', '.join(kinds)}")
  require_known("the kind of weights", kind, kinds)
  return kind, paths.typed(kind, path)


def read_json(path: Path) -> Any:
  """What a JSON file holds.

  Raises:
    UserError: if the file is not there or is not JSON.
  """
  if not path.is_file():
    raise UserError(f"{path} does not exist: a model of others comes in a folder with its config")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}): copy it again") from error


def require_new(folder: Path) -> None:
  """Raises a `UserError` where something is that a new folder would be mixed with."""
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
    path: of the file.
    arrays: by name; scalars keep their shape.
  """
  save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path, metadata={"format": "pt"})


def _is_float(array: np.ndarray) -> bool:
  return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  with safe_open(path, framework="numpy") as file:
    for name in file.keys():  # noqa: SIM118 - not a mapping
      yield name, file.get_tensor(name)


def _npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  with np.load(path, allow_pickle=False) as file:
    for name in file.files:
      array = file[name]
      # NumPy writes what it has no name for, bfloat16, as two raw bytes.
      yield name, array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


class _Storage(NamedTuple):
  """Where the numbers of tensors lie."""

  key: str
  dtype: np.dtype


class _Tensor(NamedTuple):
  """A view of a storage, in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _StorageType(NamedTuple):
  name: str


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor, *_) -> _Tensor:
  return tensor


class _Names(pickle.Unpickler):
  """Reads a pickle that may hold tensors and plain containers, and nothing else."""

  def find_class(self, module: str, name: str) -> Any:
    allowed = {
      ("collections", "OrderedDict"): OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("torch._utils", "_rebuild_parameter"): _parameter,
    }
    if (module, name) in allowed:
      return allowed[module, name]
    if module == "torch" and name in _DTYPES:
      return _StorageType(name)
    raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a weight; save its state_dict alone")

  def persistent_load(self, pid: tuple) -> _Storage:
    _, kind, key, *_ = pid
    return _Storage(key, _DTYPES[kind.name])


def _torch(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  with zipfile.ZipFile(path) as archive:
    (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    root = pickled.removesuffix("data.pkl")
    state = _Names(io.BytesIO(archive.read(pickled))).load()
    state = state.get(_STATE, state)
    storages: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
      if not isinstance(tensor, _Tensor):
        continue
      key, dtype = tensor.storage
      if key not in storages:
        storages[key] = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
      strides = [step * dtype.itemsize for step in tensor.strides]
      last = tensor.offset + sum(step * (size - 1) for step, size in zip(tensor.strides, tensor.shape, strict=True))
      if min(tensor.offset, *tensor.strides, 0) < 0 or (0 not in tensor.shape and last >= len(storages[key])):
        raise ValueError(f"tensor {name} reaches beyond its storage")
      view = np.lib.stride_tricks.as_strided(storages[key][tensor.offset :], tensor.shape, strides, writeable=False)
      yield name.removeprefix(_PREFIX), view


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, np.ndarray]]]] = {
  ".safetensors": _safetensors,
  ".npz": _npz,
  **dict.fromkeys((".bin", ".pt", ".pth"), _torch),
}
