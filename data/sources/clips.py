"""A folder of clips with a table of captions: video-text pairs of one's own."""

import os
import pathlib
from collections.abc import Iterator

from contrastive_jax import inputs, paths
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.video import open_clip
from data import tables
from data.sources import Example, Text, names_a_side, stable_hash

TABLES = ("clips.jsonl", "clips.csv")


class ClipSource:
  """The clips that a table in their folder names.

  The table is `clips.jsonl`, one object a line such as {"file": "a.mp4", "caption": "a dog runs"}, where "caption" may
  be a list; or `clips.csv` with the columns file and caption. A file may stand in several rows: it is one sample with
  all their captions.
  """

  def __init__(self, folder: str | os.PathLike, *, flip: bool = True):
    """Reads the table.

    Args:
      folder: where the clips and their table are.
      flip: whether clips may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if there is none, a row lacks a file or a caption, or a file is not there.
    """
    self.name = f"clips/{folder}"
    self._flip = flip
    self._folder = paths.typed("clips/<folder>", folder)
    captions: dict[str, list[str]] = {}
    for file, said in _rows(self._folder):
      captions.setdefault(os.fspath(file), []).extend(said)
    self._files = list(captions)
    self._texts = [
      Text(tuple(dict.fromkeys(said)), stable_hash("clips", os.fspath(folder), file)) for file, said in captions.items()
    ]
    missing = [file for file in self._files if not (self._folder / file).is_file()]
    if missing:
      raise UserError(
        f"{len(missing):,} of the {len(self._files):,} clips of {self._folder} are missing, such as {missing[0]!r}: put"
        " them there, or leave out their rows"
      )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int, /) -> Example:
    text = self._texts[index]
    return Example(
      open_clip(self._folder / self._files[index]), text, index, self._flip and not names_a_side(text.captions)
    )

  def text(self, index: int) -> Text:
    return self._texts[index]


def _rows(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
  """Yields the file and the captions of each row of the table."""
  table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
  if table is None:
    raise UserError(f"{folder} has no table of clips: write {' or '.join(TABLES)} with a file and a caption a row")
  number = 0
  for number, row in enumerate(tables.rows(table, "file"), 1):
    where = f"row {number} of {table}"
    captions = row.get("caption")
    captions = inputs.texts([captions] if isinstance(captions, str) else captions or [], f"{where}: caption")
    if not row["file"].strip() or not captions or not all(caption.strip() for caption in captions):
      raise UserError(f"{where} has file={row['file']!r} and caption={row.get('caption')!r}: give it both")
    yield paths.typed(f"{where}: file", row["file"]), captions
  if not number:
    raise UserError(f"{table} has no rows: write one with a file and a caption for each clip")
