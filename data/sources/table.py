"""A table that names pictures and tells their captions: CSV, TSV, JSON, JSON lines or Parquet."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contrastive_jax import paths
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess.decoding import DecodeError
from data import tables
from data.sources import Text, stable_hash
from data.sources.features import read_texts
from data.sources.pictures import PictureSource, in_split, place_and_split

# A column that tells the split of each row, where a table has it.
SPLIT = "split"


class TableSource(PictureSource):
  """The pictures that a table names, each once, with the captions of all its rows."""

  def __init__(
    self,
    place: str,
    *,
    image_key: str = "image",
    caption_key: str = "caption",
    root: str = "",
    flip: bool = True,
  ):
    """Reads the table; pictures are read when they are asked for.

    Args:
      place: path of the table. With "@<split>" behind it the rows whose column "split" says so; or, in a table without
        that column, of "@train" and "@test" the pictures that a hash of their paths gives it.
      image_key: column of the picture's path.
      caption_key: column of its caption, or of a list of captions.
      root: the folder that paths start from; "" is that of the table.
      flip: whether pictures may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if the table cannot be used, has not these columns or no row of the split, or its pictures are missing.
    """
    table, split = place_and_split("table/<file>", place)
    name = f"table/{place}"
    folder = paths.typed(f"root of {name!r}", root) if root else table.parent
    captions: dict[str, list[Any]] = {}
    for picture, said in _rows(table, split, name, image_key, caption_key):
      captions.setdefault(picture, []).append(said)
    if not captions:
      raise UserError(f"{name} has no rows: write one with a picture and a caption, or name another split")
    self._captions = list(captions.values())
    self._groups = [stable_hash("table", os.fspath(table), picture) for picture in captions]
    super().__init__(name, split, [_file(folder, picture, table) for picture in captions], flip)

  def text(self, index: int) -> Text:
    found = [text for said in self._captions[index] if said is not None for text in read_texts(said)]
    captions = tuple(dict.fromkeys(text for text in found if text.strip()))
    if not captions:
      raise DecodeError("its rows have no caption")
    return Text(captions, self._groups[index])


def _rows(table: Path, split: str, name: str, image_key: str, caption_key: str) -> Iterator[tuple[str, Any]]:
  """Yields the picture and the caption of each row of a split, as they stand there."""
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
    yield row[image_key], row.get(caption_key)
  if number and caption_key not in columns:
    raise UserError(
      f"{table} has no column {caption_key!r}{nearest(caption_key, columns)}: it has {', '.join(sorted(columns))}, name"
      " that of the captions with caption_key"
    )
  if split and told is not None and split not in told:
    raise UserError(
      f"{table} has no row of the split {split!r}{nearest(split, told)}: its column {SPLIT!r} has"
      f" {', '.join(sorted(told)[:8])}"
    )


def _file(folder: Path, picture: str, table: Path) -> Path:
  # To check every path as one that a person typed would ask the file system for each.
  if "://" in picture or picture.startswith("~") or "\0" in picture:
    return folder / paths.typed(f"a picture of {table}", picture)
  return folder / picture
