"""Parquet files with a column of pictures, such as the shards of a set on Hugging Face's hub.

Parquet packs its columns, so that a picture has no place of its own: its group of rows is read for it. Small groups,
of 100 rows as datasets writes them, are quick enough; `data.convert` makes shards that are read by offset.
"""

import functools
import threading
from collections.abc import Iterator
from io import BufferedReader

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.files import Files
from data.sources import arrow
from data.sources.scan import DamagedFile, Found, LeftOut

_BATCH_ROWS = 64
_OPEN_FILES = 64
_local = threading.local()


def scan(stream: BufferedReader, image_key: str, fields: frozenset[str]) -> Iterator[Found | LeftOut]:
  """Yields the rows of a file; see `scan.Scan`. The place of a picture is its row and the length of its bytes."""
  try:
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    columns = arrow.Columns(file.schema_arrow, image_key, fields)
    start = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns.read):
      yield from columns.rows(batch, start)
      start += batch.num_rows
  except (pa.ArrowException, OSError) as error:
    raise DamagedFile(f"it is no whole Parquet file ({' '.join(str(error).split())[:100]})") from error


def read(reader: Files, file: str, image_key: str, row: int) -> bytes:
  """Reads the bytes of the picture of a row, from the group of rows that this thread read last if it is there.

  Args:
    reader: reads files.
    file: the file.
    image_key: column of the picture; "" is the only one that holds pictures.
    row: number of the row.

  Raises:
    OSError: if they cannot be read.
  """
  opened, column, starts = _opened(reader, file, image_key, threading.get_ident())
  group = int(np.searchsorted(starts, row, side="right")) - 1
  if getattr(_local, "last", ("", "", -1)) != (file, image_key, group):
    try:
      _local.column = opened.read_row_group(group, columns=[column]).column(column)
    except pa.ArrowException as error:
      raise OSError(f"{file}: {error}") from error
    _local.last = (file, image_key, group)
  return arrow.bytes_of(_local.column, row - int(starts[group]))


@functools.lru_cache(_OPEN_FILES)
def _opened(reader: Files, file: str, image_key: str, _thread: int) -> tuple[pq.ParquetFile, str, np.ndarray]:
  """Opens a file for one thread; returns the column of pictures, and where each group of rows begins and ends."""
  opened = pq.ParquetFile(reader.opened(file))
  groups = [opened.metadata.row_group(k).num_rows for k in range(opened.metadata.num_row_groups)]
  return opened, arrow.Columns(opened.schema_arrow, image_key, frozenset()).image_key, np.cumsum([0, *groups])
