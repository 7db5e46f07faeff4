"""A table that names pictures and tells their captions: CSV, TSV, JSON, JSON lines or Parquet."""

import contextlib
import dataclasses
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
from data.sources.columns import weight_of
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
    weight_key: str = "",
    wrong_caption_key: str = "",
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
      weight_key: column of how much a picture's pairs count; "" is 1 for all. The rows of one picture agree in it.
      wrong_caption_key: column of a caption, or of a list, that nearly fits the picture and is wrong; "" is none.
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
    self.weight_key, self.wrong_caption_key = weight_key, wrong_caption_key
    beside = [key for key in (weight_key, wrong_caption_key) if key]
    rows = _rows(table, split, name, image_key, {**dict.fromkeys(self._weights, "caption"), **_options(self)})
    captions: dict[str, list[tuple[Any, ...]]] = {}
    more: dict[str, list[tuple[Any, ...]]] = {}
    for row in _kept(list(rows), filter, name) if filter else rows:
      captions.setdefault(row[image_key], []).append(tuple(row.get(key) for key in self._weights))
      if beside:
        more.setdefault(row[image_key], []).append(tuple(row.get(key) for key in beside))
    if not captions:
      raise UserError(f"{name} has no rows: write one with a picture and a caption, or name another split")
    self._names, self._captions = list(captions), list(captions.values())
    self._more = [dict(zip(beside, zip(*rows, strict=True), strict=True)) for rows in more.values()]
    self._groups = [stable_hash("table", os.fspath(table), picture) for picture in captions]
    super().__init__(name, split, [_file(folder, picture, table) for picture in captions], flip)

  def text(self, index: int) -> Text:
    found = []
    for weight, column in zip(self._weights.values(), zip(*self._captions[index], strict=True), strict=True):
      if captions := distinct(text for said in column if said is not None for text in read_texts(said)):
        found.append((weight, captions))
    if not found:
      raise DecodeError("its rows have no caption")
    text = weighted(found, self._groups[index])
    more = self._more[index] if self._more else {}
    if self.weight_key:
      weights = {weight_of(value, self.weight_key) for value in more[self.weight_key]}
      if len(weights) > 1:
        raise DecodeError(f"its rows have the weights {', '.join(map(str, sorted(weights)))}, which must be one")
      text = dataclasses.replace(text, weight=weights.pop())
    if self.wrong_caption_key:
      said = (caption for value in more[self.wrong_caption_key] if value is not None for caption in read_texts(value))
      text = dataclasses.replace(text, wrong=tuple(distinct(said)))
    return text

  def sample_name(self, index: int) -> str:
    return paths.as_id(self._names[index])


def _options(source: TableSource) -> dict[str, str]:
  """Returns the option that names each column beside those of captions."""
  named = {"weight": source.weight_key, "wrong_caption": source.wrong_caption_key}
  return {column: option for option, column in named.items() if column}


def _rows(table: Path, split: str, name: str, image_key: str, options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
  """Yields the rows of a split, as they stand there; `options` has the kind of each column that must be there."""
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
  absent = next((key for key in options if key not in columns), None)
  if number and absent is not None:
    what = "captions" if options[absent] == "caption" else f"{options[absent].replace('_', ' ')}s"
    raise UserError(
      f"{table} has no column {absent!r}{nearest(absent, columns)}: it has {', '.join(sorted(columns))}, name"
      f" that of the {what} with {options[absent]}_key"
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
