"""The index of a set in shards: where the bytes of each picture are, its captions and columns.

An index is a folder. `index.json` names the files of the set, with their sizes, and the parts of the index, Arrow files
of `PART_ROWS` samples each (the last has fewer) that are not compressed, so that a row is read where it lies on disk.
Parts are opened when a row of theirs is first asked for, and their checksum is compared then.
"""

import bisect
import dataclasses
import errno
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from contrastive_jax import runs
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from data.files import Files, is_local, joined, whole
from data.sources.lookup import Lookup

VERSION = 1
ABOUT = "index.json"
PART_ROWS = 1 << 20
# What the index itself tells of each sample; no field of a set is stored under these names.
MEASURED = {
  "key": pa.large_string(),
  "offset": pa.int64(),
  "size": pa.int64(),
  "crc": pa.uint32(),
  "width": pa.int32(),
  "height": pa.int32(),
  "channels": pa.int8(),
  "draw": pa.int16(),
}
TEXTS = pa.large_list(pa.large_string())
# Reads a picture of a file, given what reads files, the file, the field of the picture and its offset.
Read = Callable[[Files, str, str, int], bytes]
# Samples whose bytes are compared when an index is opened, each of another file.
_GLANCE = 32
_CRC_BLOCK = 1 << 20
# Samples that are written at once at least: a look-up takes longer the more batches a part has.
_BATCH_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class IndexedFile:
  """A file of the set.

  Attributes:
    file: its path or address.
    size: its bytes when it was indexed.
    stamp: what changes when the file is written again.
    rows: samples that were found in it.
    left_out: how many others were not used, by the reason.
  """

  file: str
  size: int
  stamp: str
  rows: int
  left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the index: the name of its file, its samples, its bytes and their CRC-32."""

  file: str
  rows: int
  size: int
  crc: int


class Index:
  """An index that was built, see `data.indexing`. Worker processes open its parts anew.

  Attributes:
    folder: its folder.
    kind: the kind of the set, such as "webdataset".
    wanted: what was asked for, see `indexing.Wanted`.
    files: the files of the set.
    texts: names of the fields that hold captions, in the order in which they are looked for.
    columns: names of the other fields.
    damaged: files of the set that were left out because they could not be read.
  """

  def __init__(self, folder: str, command: str, reader: Files):
    """Reads what the index holds; opens no part yet.

    Args:
      folder: its folder, a path or an address.
      command: the command that builds it, for errors.
      reader: reads the files of the index and of the set.

    Raises:
      UserError: if there is no such index, or it is damaged or of another version.
    """
    self.folder, self._command, self._reader = folder, command, reader
    try:
      path = self._local(ABOUT)
    except FileNotFoundError:
      raise UserError(f"{folder} holds no index: build it with {command}") from None
    about = runs.read_object(path)
    if about.get("version") != VERSION:
      raise UserError(
        f"{folder} is an index of version {about.get('version')}, and this is version {VERSION}: build it anew with"
        f" {command}"
      )
    self._image_key = about["wanted"]["image_key"]
    self.wanted = about["wanted"]
    self.kind, self.texts, self.columns = about["wanted"]["kind"], tuple(about["texts"]), tuple(about["columns"])
    self.files = [IndexedFile(**each | {"file": self._whole(each["file"])}) for each in about["files"]]
    self.damaged = tuple(self._whole(each["file"]) for each in about["damaged"])
    self._parts = [Part(**each) for each in about["parts"]]
    self._starts = np.cumsum([0, *(each.rows for each in self.files)])
    self._opened: dict[int, Lookup] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_opened": {}, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__ |= state | {"_lock": threading.Lock()}

  def value(self, column: str, row: int) -> Any:
    """Returns a value of a sample as Python has it, None where there is none.

    Raises:
      UserError: if the part of the index is missing or damaged.
    """
    part, at = divmod(row, PART_ROWS)
    return self._part(part).value(column, at)

  def values(self, column: str) -> Iterator[pa.ChunkedArray]:
    """Yields a column, part by part."""
    for part in range(len(self._parts)):
      yield self._part(part).column(column)

  def table(self, rows: range) -> pa.Table:
    """Returns consecutive samples with all their columns."""
    parts = []
    for number in range(rows.start // PART_ROWS, -(-rows.stop // PART_ROWS)):
      start, stop = (min(max(row - number * PART_ROWS, 0), PART_ROWS) for row in (rows.start, rows.stop))
      parts.append(self._part(number).table().slice(start, stop - start))
    return pa.concat_tables(parts)

  def rows_of(self, file: int) -> range:
    """Returns the rows of a file of the set."""
    return range(int(self._starts[file]), int(self._starts[file + 1]))

  def file_number(self, row: int) -> int:
    """Returns the number of the file that holds the picture of a sample."""
    return bisect.bisect_right(self._starts, row) - 1

  def file_of(self, row: int) -> str:
    """Returns that file."""
    return self.files[self.file_number(row)].file

  def read(self, row: int, otherwise: Read | None = None) -> bytes:
    """Reads the bytes of a picture, and compares them with their checksum.

    Args:
      row: number of the sample.
      otherwise: what reads them where they are not simply bytes of a file.

    Raises:
      ChangedBytes: if they are others than those that were indexed, twice.
      OSError: if they cannot be read.
    """
    offset, size, crc = (self.value(name, row) for name in ("offset", "size", "crc"))
    file = self.file_of(row)
    for _ in range(2):
      data = (
        otherwise(self._reader, file, self._image_key, offset) if otherwise else self._reader.read(file, offset, size)
      )
      if zlib.crc32(data) == crc:
        return data
    raise ChangedBytes(f"{size:,} bytes of {file} at {offset:,} are not those that were indexed")

  def check_files(self, otherwise: Read | None = None) -> None:
    """Compares the files of the set with the index: the sizes of all local ones, and the bytes of a picture in a few.

    Args:
      otherwise: as for `read`.

    Raises:
      UserError: if one is missing or has changed, by its name.
    """
    opened = range(0, len(self.files), max(1, -(-len(self.files) // _GLANCE)))
    for number, each in enumerate(self.files):
      rows = self.rows_of(number) if number in opened else ()
      if not is_local(each.file) and not rows:
        continue
      try:
        self._check_size(each)
        if rows:
          self.read(rows[len(rows) // 2], otherwise)
      except FileNotFoundError:
        raise UserError(f"{each.file} is missing, which {self.folder} indexes: put it back, or {self._again}") from None
      except ChangedBytes as error:
        raise UserError(f"{error}: {self._again}") from None

  def _local(self, name: str) -> Path:
    place = joined(self.folder, name)
    if is_local(place) and not os.path.isfile(place):
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
    return self._reader.local_copy(place)

  def _whole(self, name: str) -> str:
    return whole(joined(self.folder, name))

  @property
  def _again(self) -> str:
    return f"build the index anew with {self._command}"

  def _check_size(self, each: IndexedFile) -> None:
    size = self._reader.facts(each.file).size
    if size != each.size:
      raise UserError(f"{each.file} has {size:,} bytes, and had {each.size:,} when it was indexed: {self._again}")

  def _part(self, number: int) -> Lookup:
    part = self._opened.get(number)
    if part is None:
      with self._lock:
        part = self._opened.get(number)
        if part is None:
          part = self._opened[number] = self._open(self._parts[number])
    return part

  def _open(self, part: Part) -> Lookup:
    try:
      path = self._local(part.file)
    except FileNotFoundError:
      raise UserError(f"{self.folder} lacks {part.file}, a part of the index: {self._again}") from None
    if path.stat().st_size != part.size or _crc_of(path) != part.crc:
      raise UserError(f"{path} is damaged, a part of an index: {self._again}")
    opened = Lookup(path)
    if opened.rows != part.rows:
      raise UserError(f"{path} holds {opened.rows:,} samples, and {part.rows:,} are expected: {self._again}")
    return opened


class ChangedBytes(DecodeError):
  """The bytes of a picture are not those that were indexed."""


class Writer:
  """Writes the parts of an index, then `index.json`, by which they become the index; parts of an older one then go."""

  def __init__(self, folder: Path, schema: pa.Schema):
    self._folder, self._schema = folder, schema
    self._token = os.urandom(4).hex()
    self._parts: list[Part] = []
    self._waiting: list[pa.Table] = []
    self._sink: pa.NativeFile | None = None
    self._writer: pa.RecordBatchFileWriter | None = None
    self._rows = 0
    folder.mkdir(parents=True, exist_ok=True)

  def append(self, table: pa.Table) -> None:
    """Appends samples, with all columns of the schema."""
    self._waiting.append(table)
    if sum(each.num_rows for each in self._waiting) >= _BATCH_ROWS:
      self._write_waiting()

  def close(
    self,
    *,
    wanted: Mapping[str, Any],
    texts: Sequence[str],
    columns: Sequence[str],
    files: Sequence[IndexedFile],
    damaged: Mapping[str, str],
  ) -> None:
    """Makes what was written the index.

    Args:
      wanted: what was asked for, see `indexing.Wanted`.
      texts: names of the fields that hold captions, in the order in which they are looked for.
      columns: names of the other fields.
      files: the files of the set in the order of their rows, named from the folder of the index or by addresses.
      damaged: why files were left out, by such names.
    """
    self._write_waiting()
    if self._writer is not None:
      self._finish()
    about = {
      "version": VERSION,
      "wanted": wanted,
      "texts": texts,
      "columns": columns,
      "files": [dataclasses.asdict(each) for each in files],
      "damaged": [{"file": name, "why": why} for name, why in damaged.items()],
      "parts": [dataclasses.asdict(part) for part in self._parts],
    }
    runs.write_object(self._folder / ABOUT, about, indent=None)
    for other in self._folder.glob("part-*.arrow"):
      if other.name not in {part.file for part in self._parts}:
        other.unlink()

  @property
  def _name(self) -> str:
    return f"part-{self._token}-{len(self._parts):05d}.arrow"

  def _write_waiting(self) -> None:
    table = pa.concat_tables([self._schema.empty_table(), *self._waiting])
    self._waiting = []
    while table.num_rows:
      if self._writer is None:
        self._sink = pa.OSFile(os.fspath(self._folder / self._name), "wb")
        self._writer, self._rows = pa.ipc.new_file(self._sink, self._schema), 0
      taken = table.slice(0, PART_ROWS - self._rows)
      self._writer.write_table(taken.combine_chunks())
      self._rows += taken.num_rows
      table = table.slice(taken.num_rows)
      if self._rows == PART_ROWS:
        self._finish()

  def _finish(self) -> None:
    self._writer.close()
    self._sink.close()
    self._writer = None
    path = self._folder / self._name
    with path.open("rb") as written:
      os.fsync(written.fileno())
    self._parts.append(Part(path.name, self._rows, path.stat().st_size, _crc_of(path)))


def _crc_of(path: Path) -> int:
  """Computes the checksum of a file; read and not mapped, so that its pages count for no process."""
  crc = 0
  with path.open("rb") as file:
    while block := file.read(_CRC_BLOCK):
      crc = zlib.crc32(block, crc)
  return crc
