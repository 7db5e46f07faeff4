"""A folder of clips with a table of captions: video-text pairs of one's own."""

import csv
import json
import os
import pathlib
from collections.abc import Iterator

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.video import open_clip
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
      UserError: if there is none, or a row lacks a file or a caption.
    """
    self.name = f"clips/{folder}"
    self._flip = flip
    self._folder = paths.typed("clips/<folder>", folder)
    captions: dict[str, list[str]] = {}
    for file, caption in _rows(self._folder):
      captions.setdefault(file, []).append(caption)
    self._files = list(captions)
    self._texts = [
      Text(tuple(dict.fromkeys(said)), stable_hash("clips", os.fspath(folder), file)) for file, said in captions.items()
    ]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int, /) -> Example:
    text = self._texts[index]
    return Example(
      open_clip(self._folder / self._files[index]), text, index, self._flip and not names_a_side(text.captions)
    )

  def text(self, index: int) -> Text:
    return self._texts[index]


def _rows(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (file, caption) of the table, one for each caption."""
  path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
  if path is None:
    raise UserError(f"{folder} has no table of clips: write {' or '.join(TABLES)} with a file and a caption a row")
  with open(path, encoding="utf-8", newline="") as file:
    rows = csv.DictReader(file) if path.suffix == ".csv" else (line for line in file if line.strip())
    for number, row in enumerate(rows, 1):
      try:
        fields = row if isinstance(row, dict) else json.loads(row)
        name, captions = fields["file"], fields["caption"]
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"row {number} of {path} is no file with a caption ({error!r}): give it both") from error
      captions = [captions] if isinstance(captions, str) else captions
      if not name or not captions or not all(isinstance(caption, str) and caption for caption in captions):
        raise UserError(f"row {number} of {path} has file={name!r} and caption={captions!r}: give it both")
      for caption in captions:
        yield name, caption
