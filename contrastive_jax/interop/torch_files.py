"""Reads PyTorch's files without PyTorch.

Nothing in a file is executed: it holds a pickle, of which only the names of tensors, their shapes and where their
numbers lie are read.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from contrastive_jax.errors import UserError

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
# What checkpoints with more than weights in them call the rest.
_TRAINING = ("optim", "scaler", "scheduler", "callback", "loop", "rng", "loss", "args", "hparams", "hyper_parameters")
# Elements of a tensor that repeats those of its storage; a damaged shape would ask for more than memory holds.
_REPEATED = 2**24


class _Storage(NamedTuple):
  """The place where the numbers of tensors lie."""

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


# The reader in Python keeps its memo in a dict: that in C allocates as much memory as a damaged index says.
class _Names(pickle._Unpickler):
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
    raise pickle.UnpicklingError(
      f"it asks for {module}.{name}, which is not a weight; it holds a whole model or more than weights: where it was"
      " made, save torch.save(model.state_dict(), NEW_FILE)"
    )

  def persistent_load(self, pid: tuple) -> _Storage:
    _, kind, key, *_ = pid
    if not isinstance(kind, _StorageType) or not isinstance(key, str):
      raise pickle.UnpicklingError("it names a storage that no tensor has")
    return _Storage(key, _DTYPES[kind.name])


def read(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the names and arrays of the weights in a file that PyTorch 1.6 or newer wrote.

  Args:
    path: path of the file, which holds weights by name, alone or below a name such as "state_dict" beside the state of
      training.

  Raises:
    UserError: if it holds the weights of several models.
    ValueError: or another error, if it is damaged.
  """
  with zipfile.ZipFile(path) as archive:
    pickled = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickled) != 1:
      raise ValueError(f"it holds {len(pickled)} pickles of names instead of one")
    root = pickled[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
      raise ValueError("its numbers have their bytes in the other order: save it again on another machine")
    state = _weights(_load(archive.read(pickled[0])), path)
    storages: dict[_Storage, np.ndarray] = {}
    for name, tensor in state.items():
      if tensor.storage not in storages:
        storages[tensor.storage] = np.frombuffer(archive.read(f"{root}data/{tensor.storage.key}"), tensor.storage.dtype)
      yield name, _view(name, tensor, storages[tensor.storage])


def _load(pickled: bytes) -> Any:
  try:
    return _Names(io.BytesIO(pickled)).load()
  # A damaged pickle can fail in any way a program can.
  except Exception as error:
    raise ValueError(str(error) or type(error).__name__) from error


def _weights(state: Any, path: Path) -> dict[str, _Tensor]:
  """Returns the tensors by name, which lie below other names in checkpoints of training."""
  while True:
    if not isinstance(state, Mapping):
      raise ValueError("it does not hold weights by name: save model.state_dict()")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, _Tensor)}
    parts = [
      name
      for name, value in state.items()
      if _holds_tensors(value) and not any(word in str(name).lower() for word in _TRAINING)
    ]
    if tensors and not parts:
      return tensors
    if tensors or len(parts) > 1:
      names = ", ".join(map(str, parts))
      raise UserError(f"{path} holds several sets of weights ({names}): save the one that you mean alone")
    if not parts:
      raise ValueError("it holds no weights: save model.state_dict()")
    state = state[parts[0]]


def _holds_tensors(value: Any) -> bool:
  return isinstance(value, Mapping) and any(
    isinstance(inner, _Tensor) or _holds_tensors(inner) for inner in value.values()
  )


def _view(name: str, tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
  if len(tensor.shape) != len(tensor.strides) or min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0:
    raise ValueError(f"tensor {name} has the shape {tensor.shape} and the strides {tensor.strides}")
  last = tensor.offset + sum(step * (size - 1) for step, size in zip(tensor.strides, tensor.shape, strict=True))
  if (0 not in tensor.shape and last >= len(storage)) or math.prod(tensor.shape) > max(len(storage), _REPEATED):
    raise ValueError(f"tensor {name} reaches beyond its storage")
  strides = [step * storage.dtype.itemsize for step in tensor.strides]
  return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
