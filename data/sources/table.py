"""A table that names pictures and tells their captions: CSV, TSV, JSON, JSON lines or Parquet."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from contrastive_jax import paths
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess.decoding import DecodeError
from data import tables
from data.sources import Text, in_order, stable_hash, weighted
from data.sources.features import distinct, read_texts
from data.sources.keep import Filter
from data.sources.pictures import FilePictures, in_split, place_and_split

# A column that tells the split of each row, where a table has it.
SPLIT = "split"


class TableSource(FilePictures):
  """The pictures that a table names, each once, with the captions of all its rows."""

  def __init__(
    self,
    place: str,
    *,
    image_key: str = "image",
    caption_key: str | Mapping[str, float] = "caption",
    root: str = "",
    filter: str = "",
    flip: bool = True,
  ):
    """Reads the table; pictures are read when they are asked for.

    Args:
      place: path of the table. With "@<split>" behind it the rows whose column "split" says so; or, in a table without
        that column, of "@train" and "@test" the pictures that a hash of their paths gives it.
      image_key: column of the picture's path.
      caption_key: column of its caption or of a list of captions; or weights of several, of which one is drawn by its
        weight among those that a picture has.
      root: the folder that paths start from; "" is that of the table.
      filter: the rows that are kept, as `keep.Filter` reads it; "" keeps all. Columns of numbers may be text.
      flip: whether pictures may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if the table cannot be used, has not these columns or no row of the split, or its pictures are missing.
    """
    table, split = place_and_split("table/<file>", place)
    name = f"table/{place}"
    folder = paths.typed(f"root of {name!r}", root) if root else table.parent
    self._weights = {caption_key: 1.0} if isinstance(caption_key, str) else in_order(caption_key)
    rows = _rows(table, split, name, image_key, tuple(self._weights))
    captions: dict[str, list[tuple[Any, ...]]] = {}
    for row in _kept(list(rows), filter, name) if filter else rows:
      captions.setdefault(row[image_key], []).append(tuple(row.get(key) for key in self._weights))
    if not captions:
      raise UserError(f"{name} has no rows: write one with a picture and a caption, or name another split")
    self._names, self._captions = list(captions), list(captions.values())
    self._groups = [stable_hash("table", os.fspath(table), picture) for picture in captions]
    super().__init__(name, split, [_file(folder, picture, table) for picture in captions], flip)

  def text(self, index: int) -> Text:
    found = []
    for weight, column in zip(self._weights.values(), zip(*self._captions[index], strict=True), strict=True):
      if captions := distinct(text for said in column if said is not None for text in read_texts(said)):
        found.append((weight, captions))
    if not found:
      raise DecodeError("its rows have no caption")
    return weighted(found, self._groups[index])

  def sample_name(self, index: int) -> str:
    return paths.as_id(self._names[index])


def _rows(table: Path, split: str, name: str, image_key: str, caption_keys: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yields the rows of a split, as they stand there."""
  columns: set[str] = set()
  told: set[str] | None = None
  number = 0
  for number, row in enumerate(tables.rows(table, image_key, " or name it with image_key"), 1):
    columns |= row.keys()
    if number == 1 and SPLIT in row:
      told = set()
    if told is not None and not isinstance(row.get(SPLIT), str):
      raise UserError(f"row {number} of {table} has no {SPLIT!r}, and row 1 has one: give each row its split, or none")
    if told is None and SPLIT in row:
      raise UserError(f"row {number} of {table} has a {SPLIT!r}, and row 1 has none: give each row its split, or none")
    if not row[image_key].strip():
      raise UserError(f"row {number} of {table} has an empty {image_key!r}: name a picture, or leave out the row")
    if split and told is not None:
      told.add(row[SPLIT])
      if row[SPLIT] != split:
        continue
    elif not in_split(name, split, row[image_key]):
      continue
    yield row
  absent = next((key for key in caption_keys if key not in columns), None)
  if number and absent is not None:
    raise UserError(
      f"{table} has no column {absent!r}{nearest(absent, columns)}: it has {', '.join(sorted(columns))}, name"
      " that of the captions with caption_key"
    )
  if split and told is not None and split not in told:
    raise UserError(
      f"{table} has no row of the split {split!r}{nearest(split, told)}: its column {SPLIT!r} has"
      f" {', '.join(sorted(told)[:8])}"
    )


def _kept(rows: Sequence[dict[str, Any]], text: str, name: str) -> list[dict[str, Any]]:
  known = list(dict.fromkeys(key for row in rows for key in row))
  chosen = Filter(text, known, name)
  keep = chosen.kept({column: _column([row.get(column) for row in rows], column, name) for column in chosen.columns})
  found = [row for row, kept in zip(rows, keep, strict=True) if kept]
  if rows and not found:
    raise UserError(f"{name}: the filter {text!r} keeps none of {len(rows):,} rows: name another")
  return found


def _column(values: Sequence[Any], column: str, name: str) -> pa.Array:
  """Returns a column for a filter; numbers that are written as text, as all are in CSV, become numbers."""
  told = [value if value != "" else None for value in values]
  if all(value is None or isinstance(value, str) for value in told):
    with contextlib.suppress(ValueError):
      told = [None if value is None else float(value) for value in told]
  try:
    return pa.array(told)
  except pa.ArrowException:
    raise UserError(f"{name}: the column {column!r} holds values of several types, which no filter can name") from None


def _file(folder: Path, picture: str, table: Path) -> Path:
  # To check every path as one that a person typed would ask the file system for each.
  if "://" in picture or picture.startswith("~") or "\0" in picture:
    return folder / paths.typed(f"a picture of {table}", picture)
  return folder / picture
