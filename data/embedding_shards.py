"""Embeddings of a whole set in shards: a Parquet file for so many samples, which is kept when a command goes on."""

import concurrent.futures
import functools
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contrastive_jax import runs
from contrastive_jax.bad_records import BadRecord, retried
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import straight
from data import embedding_files, executors, shared_source
from data.sources.pictures import StoredPictures
from data.substitution import shard_of

IMAGES, TEXTS = "images", "texts"
# What stands between the name of a sample and the number of its caption.
_NUMBERED = "#"


class Shard(NamedTuple):
  """A shard that is there: its file, its rows, the samples that were left out, and whether it was there before."""

  file: Path
  rows: int
  left_out: int
  kept: bool


def write(
  folder: Path,
  model: embedding_files.Embedder,
  source: StoredPictures,
  *,
  of: str = IMAGES,
  shard_rows: int = 100_000,
  about: Mapping[str, str] | None = None,
  overwrite: bool = False,
  executor: concurrent.futures.Executor | None = None,
  model_of_a_worker: Callable[[], embedding_files.Embedder] | None = None,
) -> Iterator[Shard]:
  """Embeds a set, a shard at a time, and yields each shard once it is there.

  The id of an image is the name of its sample; that of a text is the same, with "#" and the number of the caption among
  those of its sample. A shard that is there already is kept if it is whole and of the same request.

  Args:
    folder: the folder of the shards. Workers on other machines have to see it under the same path.
    model: the encoder.
    source: the set.
    of: "images" or "texts".
    shard_rows: number of samples of each shard. One of texts has a row for each caption of these.
    about: the origin of the embeddings, such as the model, which is written with them.
    overwrite: whether shards that are there are written anew.
    executor: what embeds, such as the workers of a cluster; None embeds in this process.
    model_of_a_worker: a function that opens the encoder in a worker of the executor, which can be pickled.

  Raises:
    UserError: if the folder holds other files, or none of the samples of a shard can be read.
  """
  count = len(source)
  starts = range(0, count, shard_rows)
  files = [folder / f"{number:06d}.parquet" for number in range(len(starts))]
  if other := min(set(folder.glob("*.parquet")) - set(files), default=None):
    raise UserError(f"{folder} holds {other.name}, which is no shard of this request: name another folder")
  missing = {}
  for file, start in zip(files, starts, strict=True):
    rows = range(start, min(count, start + shard_rows))
    told = {**(about or {}), "of": of, "samples": f"{rows.start}:{rows.stop} of {count}"}
    told["digest"] = runs.digest(told)  # Parquet has checksums of its pages, and none of what it says of itself.
    if overwrite or not (file.exists() and _is_whole(file, told, _names(source, rows), model.config.embed_dim)):
      missing[file] = rows, told
    else:
      yield _shard(file, of, len(rows), kept=True)
  if executor is None:
    for file, (rows, told) in missing.items():
      _write_shard(file, model, source, rows, told)
      yield _shard(file, of, len(rows), kept=False)
  elif missing:
    yield from _write_elsewhere(folder, missing, source, of, executor, model_of_a_worker)


def _write_elsewhere(
  folder: Path,
  missing: Mapping[Path, tuple[range, Mapping[str, str]]],
  source: StoredPictures,
  of: str,
  executor: concurrent.futures.Executor,
  open_model: Callable[[], embedding_files.Embedder],
) -> Iterator[Shard]:
  folder.mkdir(parents=True, exist_ok=True)
  # Of this command alone: a worker may have read the set, or the model, of one before.
  shared = folder.absolute() / f".source.{uuid.uuid4().hex}.pickle"
  try:
    shared_source.write(source, shared)
    opens = pickle.dumps(open_model)
    calls = {
      file: (os.fspath(shared), opens, os.fspath(file.absolute()), rows, told) for file, (rows, told) in missing.items()
    }
    for file, _ in executors.each(executor, write_shard, calls, "shards", "embedding"):
      yield _shard(file, of, len(missing[file][0]), kept=False)
  finally:
    shared.unlink(missing_ok=True)


def write_shard(shared: str, open_model: bytes, file: str, rows: range, told: Mapping[str, str]) -> None:
  """Writes a shard in a worker, which opens the model once for all shards of a command."""
  _write_shard(Path(file), _opened(shared, open_model), shared_source.read(shared), rows, told)


@functools.lru_cache(1)
def _opened(_shared: str, open_model: bytes) -> embedding_files.Embedder:
  return pickle.loads(open_model)()


def _write_shard(
  file: Path, model: embedding_files.Embedder, source: StoredPictures, rows: range, told: Mapping[str, str]
) -> None:
  names = _names(source, rows)
  if told["of"] == TEXTS:
    ids, items, bad = _texts(source, rows, names)
  else:
    ids, items, bad = names, _Stored(source, rows), []
  embedding_files.write(file, model, ids, items, told, bad)


def _names(source: StoredPictures, rows: range) -> list[str]:
  return [source.sample_name(index) for index in rows]


def _shard(file: Path, of: str, samples: int, kept: bool) -> Shard:
  ids = pq.read_table(file, columns=["id"])["id"].to_pylist()
  # Each sample that could be read has a caption of the number 0.
  present = sum(each.endswith(f"{_NUMBERED}0") for each in ids) if of == TEXTS else len(ids)
  return Shard(file, len(ids), samples - present, kept)


class _Stored(Sequence):
  """The pictures of some samples, read when they are asked for."""

  def __init__(self, source: StoredPictures, rows: range):
    self._source, self._rows = source, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, at: int) -> bytes | np.ndarray:
    stored = _read(self._source, lambda: self._source.stored(self._rows[at]), self._rows[at])
    return stored if isinstance(stored, bytes) else straight(stored)


def _texts(source: StoredPictures, rows: range, names: Sequence[str]) -> tuple[list[str], list[str], list[BadRecord]]:
  ids, texts, bad = [], [], []
  for name, index in zip(names, rows, strict=True):
    try:
      captions = _read(source, lambda index=index: source.text(index).captions, index)
    except DecodeError as error:
      bad.append(BadRecord(name, index, str(error), shard=shard_of(source, index), use="embedding"))
      continue
    for number, caption in enumerate(captions):
      ids.append(f"{name}{_NUMBERED}{number}")
      texts.append(caption)
  return ids, texts, bad


def _read(source: StoredPictures, read: Callable[[], Any], index: int) -> Any:
  """Reads what belongs to a sample; a file system that fails ends the command, which then goes on where it was."""
  try:
    return retried(read)
  except OSError as error:
    raise UserError(
      f"sample {index} of {source.name} cannot be read ({error.strerror or error}): mend that and run the same command"
      " again"
    ) from error


def _is_whole(file: Path, about: Mapping[str, str], names: Sequence[str], dim: int) -> bool:
  """Says whether a shard that is there can be kept: it is not damaged, and of these samples.

  Raises:
    UserError: if it was written for another request.
  """
  try:
    table = pq.read_table(file, page_checksum_verification=True)
  except (pa.ArrowException, OSError):
    return False
  said = embedding_files.origin(table.schema)
  digest = said.pop("digest", "")
  if digest != runs.digest(said):
    return False
  for key, value in about.items():
    before = said.get(key)
    if before != value and key != "digest":
      raise UserError(
        f"{file} was written with {key}={before!r}, and now it is {value!r}: name another folder, or add --overwrite"
      )
  if table.schema.names != ["id", "embedding"] or table.schema.field("embedding").type.list_size != dim:
    return False
  ids = table["id"].to_pylist()
  return set(names).issuperset([each.rpartition(_NUMBERED)[0] for each in ids] if about["of"] == TEXTS else ids)
