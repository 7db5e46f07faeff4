"""Single values of an Arrow file that is not compressed, of which only their own bytes are read.

A mapped file would tell them too. But a page that is touched brings its neighbours along, hundreds of kilobytes where a
file system has large pages: reading at random, each process would soon have the whole file resident, and giving the
pages back would take longer than these reads do.
"""

import bisect
import os
import struct
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

_OFFSETS = struct.Struct("=qq")
_CODES = {"int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I"}
_CODES |= {"uint64": "Q", "float": "f", "double": "d"}


class _Array(NamedTuple):
  """Where an array lies in the file: its validity, -1 where all values are there; its offsets and its items.

  `read` reads a number, and is None for a text, a list or truth values, of which only the latter have no offsets.
  `items` is the place of the bytes of texts or numbers or of the bits of truth values, or the array of a list.
  """

  read: struct.Struct | None
  validity: int
  offsets: int
  items: "int | _Array"


class Lookup:
  """The values of an Arrow file, found by column and row.

  Attributes:
    rows: the number of rows.
  """

  def __init__(self, path: Path):
    """Reads where the columns lie, and keeps the file open."""
    self._path = os.fspath(path)
    self._file = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)
    with pa.memory_map(self._path) as mapped:
      whole = mapped.read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    self._starts, self._columns = [0], {name: [] for name in reader.schema.names}
    for number in range(reader.num_record_batches):
      batch = reader.get_batch(number)
      self._starts.append(self._starts[-1] + batch.num_rows)
      for name, arrays in self._columns.items():
        array = batch.column(name)
        places = [-1 if buffer is None else buffer.address - whole.address for buffer in array.buffers()]
        arrays.append(_placed(array.type, places))
    self.rows = self._starts[-1]

  def value(self, column: str, row: int) -> Any:
    """Returns a number, a truth value, a text or a list of these; None where there is none."""
    batch = bisect.bisect_right(self._starts, row) - 1
    return self._value(self._columns[column][batch], row - self._starts[batch])

  def column(self, column: str) -> pa.ChunkedArray:
    """Returns a whole column, mapped for as long as it is used."""
    return self.table().column(column)

  def table(self) -> pa.Table:
    """Returns all columns, mapped for as long as they are used."""
    return pa.ipc.open_file(pa.memory_map(self._path)).read_all()

  def _value(self, array: _Array, at: int) -> Any:
    read, validity, offsets, items = array
    if validity >= 0 and not self._bit(validity, at):
      return None
    if read is not None:
      return read.unpack(self._bytes(items + at * read.size, read.size))[0]
    if offsets < 0:
      return self._bit(items, at)
    start, stop = _OFFSETS.unpack(self._bytes(offsets + at * _OFFSETS.size // 2, _OFFSETS.size))
    if isinstance(items, _Array):
      return [self._value(items, k) for k in range(start, stop)]
    return self._bytes(items + start, stop - start).decode()

  def _bit(self, start: int, at: int) -> bool:
    return bool(self._bytes(start + at // 8, 1)[0] >> at % 8 & 1)

  def _bytes(self, start: int, count: int) -> bytes:
    # What is empty lies nowhere.
    data = os.pread(self._file, count, start) if count else b""
    if len(data) < count:
      raise OSError(f"{self._path} ends before byte {start + count:,}")
    return data


def _placed(kind: pa.DataType, places: list[int]) -> _Array:
  """Returns where an array lies, given the places of its buffers, those of the items of a list behind its own."""
  if pa.types.is_large_list(kind):
    return _Array(None, places[0], places[1], _placed(kind.value_type, places[2:]))
  if pa.types.is_large_string(kind):
    return _Array(None, *places)
  if pa.types.is_boolean(kind):
    return _Array(None, places[0], -1, places[1])
  return _Array(struct.Struct(f"={_CODES[str(kind)]}"), places[0], -1, places[1])
