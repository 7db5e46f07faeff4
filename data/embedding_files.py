"""Files of embeddings with their ids: written in chunks, and there only when they are complete.

Parquet files have the columns "id" and "embedding", and the origin of the embeddings in the metadata of their schema.
Beside NAME.npy the ids lie in NAME.ids.txt, one a line, and the origin in NAME.about.json. Items that could not be read
are listed in OUTPUT.bad_records.jsonl.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from contrastive_jax import paths
from contrastive_jax.bad_records import BadRecord, BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from contrastive_jax.runs import write_atomically

Append = Callable[[list[str], Float[np.ndarray, "rows dim"]], None]
# Rows that are embedded together: what is held in memory of a long list.
CHUNK = 16_384
# What stands before the names of the origin in the metadata of a Parquet file.
_PREFIX = "contrastive_jax."


@runtime_checkable
class Embedder(Protocol):
  """What embeds images and texts, such as a `Model`; `config.embed_dim` is the length of an embedding."""

  config: Any

  def encode_image(self, images: Sequence) -> Float[np.ndarray, "images dim"]: ...

  def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]: ...


def beside(output: Path) -> tuple[Path, ...]:
  """Returns the files written next to an output: of a .npy its ids and its origin, and last what was left out."""
  ends = (".ids.txt", ".about.json") if output.suffix == ".npy" else ()
  return (*(output.with_suffix(end) for end in ends), output.with_name(f"{output.name}.bad_records.jsonl"))


def origin(schema: pa.Schema) -> dict[str, str]:
  """Returns what a Parquet file of embeddings says of its origin, in the metadata of its schema."""
  metadata = schema.metadata or {}
  texts = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items()}
  return {key.removeprefix(_PREFIX): value for key, value in texts.items()}


def write(
  output: Path,
  model: Embedder,
  ids: Sequence[str],
  items: Sequence,
  about: Mapping[str, str] | None = None,
  bad: Sequence[BadRecord] = (),
) -> list[str]:
  """Embeds items and writes their embeddings, some thousands at a time.

  Args:
    output: path of the file, which ends in ".parquet" or ".npy"; it is there only when it is complete.
    model: the encoder.
    ids: the id of each item.
    items: a list of texts; or images as `Embedder` takes them, of which each may be read when it is asked for.
    about: the origin of the embeddings, such as the model, which is written with them.
    bad: records that are no items since they could not be read, to be listed with those that cannot.

  Returns:
    The ids of the items that cannot be read.

  Raises:
    UserError: if no item can be read; then nothing is written.
  """
  unreadable: list[str] = []
  partial = paths.beside(output, "partial")
  output.parent.mkdir(parents=True, exist_ok=True)
  *_, left_out = beside(output)
  left_out.unlink(missing_ok=True)
  ledger = BadRecords(left_out)
  for record in bad:
    ledger.add(record)
  are_texts = isinstance(items, list) and bool(items) and isinstance(items[0], str)
  with _discarded(partial), WRITERS[output.suffix](partial, output, model.config.embed_dim, about or {}) as append:
    for start in range(0, len(ids), CHUNK):
      rows = list(range(start, min(start + CHUNK, len(ids))))
      if are_texts:
        embeddings = model.encode_text([items[row] for row in rows])
      else:
        try:
          embeddings = model.encode_image(_Some(items, rows))
        except (DecodeError, OSError):
          # Only now is it worth to read every file twice.
          wrong = {row: reason for row in rows if (reason := _wrong_with(items, row))}
          for row, reason in wrong.items():
            unreadable.append(ids[row])
            ledger.add(BadRecord(ids[row], row, reason, use="embedding"))
          rows = [row for row in rows if row not in wrong]
          if not rows:
            continue
          embeddings = model.encode_image(_Some(items, rows))
      append([ids[row] for row in rows], embeddings)
    if len(unreadable) == len(ids):
      raise UserError(f"none of the {len(ids):,} images can be read, see {left_out}: nothing was written")
  partial.replace(output)
  return unreadable


class _Some(Sequence):
  """Some of the items, each read when it is asked for."""

  def __init__(self, items: Sequence, rows: Sequence[int]):
    self._items, self._rows = items, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, at: int) -> Any:
    return self._items[self._rows[at]]


def _wrong_with(items: Sequence, row: int) -> str:
  """Says why a picture cannot be read; "" when it can."""
  try:
    decode(items[row])
  except (DecodeError, OSError) as error:
    return getattr(error, "strerror", None) or str(error)
  return ""


@contextlib.contextmanager
def _discarded(partial: Path) -> Iterator[None]:
  """Leaves nothing half written behind."""
  try:
    yield
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def _parquet(partial: Path, output: Path, dim: int, about: Mapping[str, str]) -> Iterator[Append]:
  metadata = {f"{_PREFIX}{key}": value for key, value in about.items()}
  schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))], metadata=metadata)
  # An open file, since Arrow takes some names for addresses.
  with open(partial, "wb") as file, pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:

    def append(ids: list[str], embeddings: np.ndarray) -> None:
      vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), dim)
      writer.write_table(pa.table([pa.array(ids), vectors], schema=schema))

    yield append


@contextlib.contextmanager
def _npy(partial: Path, output: Path, dim: int, about: Mapping[str, str]) -> Iterator[Append]:
  parts, names = [np.empty((0, dim), np.float32)], []

  def append(ids: list[str], embeddings: np.ndarray) -> None:
    parts.append(embeddings)
    names.extend(ids)

  yield append
  with open(partial, "wb") as file:
    np.save(file, np.concatenate(parts))
  ids_file, about_file, _ = beside(output)
  write_atomically(ids_file, "".join(f"{name}\n" for name in names))
  write_atomically(about_file, json.dumps(dict(about), indent=2) + "\n")


WRITERS = {".parquet": _parquet, ".npy": _npy}
