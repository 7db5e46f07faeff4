"""Sets that Hugging Face's datasets saved to a folder with `save_to_disk`: Arrow files, read by offset."""

import dataclasses
import os
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import numpy as np
import pyarrow as pa

from contrastive_jax import runs
from contrastive_jax.errors import UserError
from data.files import joined, whole
from data.sources import arrow
from data.sources.scan import DamagedFile, Found, LeftOut, Place


def scan(stream: BufferedReader, image_key: str, fields: frozenset[str]) -> Iterator[Found | LeftOut]:
  """Yields the rows of a file; see `scan.Scan`."""
  source = pa.PythonFile(stream, "r")
  try:
    schema = pa.ipc.read_schema(source)
    columns = arrow.Columns(schema, image_key, fields)
    start = 0
    for message in _messages(source):
      end = source.tell()
      batch = pa.ipc.read_record_batch(message, schema)
      offsets, data = _layout(batch.column(columns.image_key))
      first = end - message.body.size + data.address - message.body.address
      for found in columns.rows(batch.select(columns.read), start):
        if isinstance(found, Found):
          place = Place(first + int(offsets[found.place.offset - start]), found.place.size)
          found = dataclasses.replace(found, place=place)
        yield found
      start += batch.num_rows
  except (pa.ArrowException, OSError, EOFError) as error:
    raise DamagedFile(f"it is no whole Arrow file ({' '.join(str(error).split())[:100]})") from error


def files_in(folder: str) -> list[str]:
  """Returns the files of a folder that `save_to_disk` wrote, in their order.

  Raises:
    UserError: if it is none, or holds several splits.
  """
  splits = joined(folder, "dataset_dict.json")
  if os.path.isfile(splits):
    names: list[Any] = runs.read_json(splits).get("splits", [])
    raise UserError(
      f"{folder} holds the splits {', '.join(map(str, names))}: name one, as in huggingface/{folder}/{names[0]}"
      if names
      else f"{folder} holds no split: save the set again"
    )
  state = runs.read_json(joined(folder, "state.json"))
  if state.get("_indices_files") or state.get("_indices_data_files"):
    raise UserError(f"{folder} was saved with a selection of rows beside its files: save flatten_indices() of it")
  return [whole(joined(folder, each["filename"])) for each in state.get("_data_files", [])]


def _layout(stored: pa.Array) -> tuple[np.ndarray, pa.Buffer]:
  """Returns where the bytes of each value of a column of pictures begin, and the buffer in which they lie."""
  if pa.types.is_struct(stored.type):
    stored = stored.field(stored.type.get_field_index("bytes"))
  _, offsets, data = stored.buffers()
  return np.frombuffer(offsets, np.int64 if pa.types.is_large_binary(stored.type) else np.int32)[stored.offset :], data


def _messages(source: pa.NativeFile) -> Iterator[pa.Message]:
  """Yields the batches of a stream, of which the mark of its end has to be there."""
  while True:
    try:
      message = pa.ipc.read_message(source)
    except EOFError:
      if source.tell() < 8 or not _ends_here(source):
        raise DamagedFile("it is cut: the mark of its end is missing") from None
      return
    if message.type != "record batch":
      raise DamagedFile(f"it holds a {message.type}, and plain columns are needed: save the set by datasets")
    yield message


def _ends_here(source: pa.NativeFile) -> bool:
  end = source.tell()
  source.seek(end - 8)
  return source.read(8) == b"\xff\xff\xff\xff\0\0\0\0"
