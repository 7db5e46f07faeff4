"""A cache of a teacher's image embeddings: a folder for each source, read by sample id.

    <cache>/teacher.json          the teacher that made the embeddings
    <cache>/<source>/ids.npy      sample ids within the source, ascending
    <cache>/<source>/image.npy    an embedding of each, float16 or float32

Captions are not in it: which of them a step shows is drawn anew each time.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contrastive_jax import paths
from contrastive_jax.batch import Targets
from contrastive_jax.errors import UserError
from contrastive_jax.runs import read_object, write_object

_AGAIN = "remove the source's folder there and run distill.py again"
_LENGTH_LOST = 0.02
# Embeddings that are put in order at once.
_BLOCK = 1 << 16


class TargetCache:
  """The targets that `write_source` wrote, for the sources of one run, which stay on disk until they are asked for.

  Attributes:
    dim: size of the embeddings.
  """

  def __init__(self, path: str | os.PathLike, id_base: Mapping[str, int]):
    """Opens the cache.

    Args:
      path: path of the cache.
      id_base: the number that the run adds to the ids of each source, by name; ids of two sources do not interleave.

    Raises:
      UserError: if this is no cache, or it lacks a source.
    """
    self._path, self._id_base = paths.typed("distillation.targets", path), dict(id_base)
    if not (self._path / "teacher.json").is_file():
      raise UserError(f"distillation.targets={path} is no cache of targets: write one with distill.py")
    missing = [name for name in self._id_base if not has_source(self._path, name)]
    if missing:
      raise UserError(
        f"distillation.targets={path} has no targets of source '{missing[0]}': add them with distill.py, which keeps"
        " what is there"
      )
    self._names = sorted(self._id_base, key=self._id_base.__getitem__)
    self._bases = np.array([self._id_base[name] for name in self._names], np.int64)
    opened = [_opened(self._path, name) for name in self._names]
    self._ids, self._images = [ids for ids, _ in opened], [images for _, images in opened]
    dims = {images.shape[1] for images in self._images}
    if len(dims) > 1:
      raise UserError(f"distillation.targets={path} has targets of {sorted(dims)} numbers: write all by one teacher")
    self.dim = int(dims.pop())

  def lookup(self, ids: Int[np.ndarray, "pairs"]) -> Targets:
    """Reads the targets of samples, by the ids that the run gives them.

    Raises:
      UserError: naming the first sample that is missing.
    """
    image = np.empty((len(ids), self.dim), np.float32)
    source = np.searchsorted(self._bases, ids, side="right") - 1
    for number in np.unique(source):
      mine = source == number
      own = ids[mine] - self._bases[number]
      known = self._ids[number]
      row = np.minimum(np.searchsorted(known, own), len(known) - 1)
      wrong = own[known[row] != own]
      if len(wrong):
        raise UserError(
          f"distillation.targets={self._path} has no target of sample {wrong[0]} of source '{self._names[number]}':"
          f" its data has changed since, {_AGAIN}"
        )
      image[mine] = self._images[number][row]
    # Half precision took a little of their length; damage takes more.
    lengths = np.linalg.norm(image, axis=1, keepdims=True)
    if not (np.abs(lengths - 1) < _LENGTH_LOST).all():
      raise UserError(f"distillation.targets={self._path} holds targets whose length is not 1: {_AGAIN}")
    return Targets(image / lengths)

  def __reduce__(self):
    # A pickled memory map would carry the whole file to a worker process.
    return TargetCache, (self._path, self._id_base)


def has_source(path: Path, name: str) -> bool:
  """Says whether the targets of a source are all there."""
  return (folder_of(path, name) / "ids.npy").is_file()


def describe(path: Path, teacher: Mapping[str, Any]) -> None:
  """Begins a cache, or continues one of the same teacher.

  Args:
    path: path of the cache.
    teacher: JSON that tells one teacher from another.

  Raises:
    UserError: if the folder holds another teacher's targets.
  """
  file = path / "teacher.json"
  if file.is_file():
    theirs = read_object(file)
    if theirs != dict(teacher):
      raise UserError(f"--output={path} holds targets of another teacher ({theirs}): choose another folder")
  path.mkdir(parents=True, exist_ok=True)
  write_object(file, teacher)


def write_source(
  path: Path,
  name: str,
  chunks: Iterable[tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_ _"]]],
  dtype: str = "float16",
) -> int:
  """Writes the targets of one source; until it returns, `has_source` is false.

  Args:
    path: path of the cache.
    name: name of the source.
    chunks: ids within the source and their embeddings, in any order; of an id that comes twice the first counts.
    dtype: type of the stored embeddings, "float16" or "float32".

  Returns:
    The number of samples written.
  """
  folder = folder_of(path, name)
  folder.mkdir(parents=True, exist_ok=True)
  unsorted, ids, dim = folder / "unsorted", [np.empty(0, np.int64)], 0
  with unsorted.open("wb") as file:
    for numbers, embeddings in chunks:
      ids.append(numbers)
      dim = embeddings.shape[1]
      file.write(np.ascontiguousarray(embeddings, dtype).tobytes())
  known, order = np.unique(np.concatenate(ids), return_index=True)
  if len(known):
    rows = np.memmap(unsorted, dtype, "r").reshape(-1, dim)
    image = np.lib.format.open_memmap(folder / "image.npy", "w+", np.dtype(dtype), (len(known), dim))
    for start in range(0, len(known), _BLOCK):
      image[start : start + _BLOCK] = rows[order[start : start + _BLOCK]]
    image.flush()
    np.save(folder / "writing.npy", known)
    (folder / "writing.npy").rename(folder / "ids.npy")
  unsorted.unlink()
  return len(known)


def _opened(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Opens the ids and the embeddings of a source, which stay on disk.

  Raises:
    UserError: if a file is missing or damaged.
  """
  arrays = []
  for file in (folder_of(path, name) / "ids.npy", folder_of(path, name) / "image.npy"):
    try:
      arrays.append(np.load(file, mmap_mode="r"))
    except Exception as error:  # NumPy raises what its parser of headers does for files that are damaged.
      said = "it is missing" if isinstance(error, FileNotFoundError) else f"it is damaged ({type(error).__name__})"
      raise UserError(f"{file} of distillation.targets={path} cannot be read, {said}: {_AGAIN}") from error
  ids, images = arrays
  fits = ids.ndim == 1 and ids.dtype == np.int64 and images.ndim == 2 and images.dtype in (np.float16, np.float32)
  if not fits or not images.flags.c_contiguous or len(ids) != len(images) or not images.shape[1]:
    what = f"{ids.dtype}{list(ids.shape)} ids and {images.dtype}{list(images.shape)} embeddings"
    raise UserError(f"source '{name}' of distillation.targets={path} has {what}, which do not fit: {_AGAIN}")
  if not len(ids) or (np.diff(ids) <= 0).any():
    raise UserError(f"source '{name}' of distillation.targets={path} has no ids in ascending order: {_AGAIN}")
  return ids, images


def folder_of(path: Path, name: str) -> Path:
  """Returns the folder of what a cache holds of a source, named like the source; no name leads out of the cache."""
  parts = ["%2E%2E" if part == ".." else part for part in name.split("/")]
  short = [part if len(part.encode()) < 200 else hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts]
  return path.joinpath(*(part for part in short if part))
