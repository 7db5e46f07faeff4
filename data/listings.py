"""Listings of items to be embedded: a folder of pictures, a table that names them, a table of texts, or lines."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from contrastive_jax import inputs, paths
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import formats
from data import tables


def images(source: Path) -> tuple[list[str], list[Path]]:
  """Returns the ids and the paths of pictures.

  Args:
    source: a folder, of whose pictures the path below it is the id (see `paths.as_id`), linked folders included; or a
      table with the column "path", relative to the table, and "id" where the path is not to be it.

  Raises:
    UserError: if the table cannot be used.
  """
  if source.is_dir():
    found = sorted(path for path in paths.files_below(source) if formats.is_picture(path))
    return [paths.as_id(path.relative_to(source).as_posix()) for path in found], found
  rows = list(tables.rows(source, "path"))
  named = []
  for number, row in enumerate(rows, 1):
    if not row["path"].strip():
      raise UserError(f"row {number} of {source} has an empty 'path': name a picture, or leave out the row")
    named.append(source.parent / paths.typed(f"row {number} of {source}: path", row["path"]))
  return tables.ids(source, rows, [row["path"] for row in rows]), named


def texts(source: Path) -> tuple[list[str], list[str]]:
  """Returns the ids and the texts.

  Args:
    source: a file of lines, of which the number of the line, from 1, is the id; or a table with the column "text", and
      "id" where the number of the row is not to be it.

  Raises:
    UserError: if the file cannot be read or used.
  """
  if not tables.is_table(source):
    found = tables.lines(source)
    return [str(number) for number in range(1, len(found) + 1)], inputs.texts(found, str(source))
  rows = list(tables.rows(source, "text"))
  ids = tables.ids(source, rows, range(1, len(rows) + 1))
  return ids, inputs.texts([row["text"] for row in rows], f"{source}: text")


def without_blank(ids: Sequence[str], texts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
  """Returns the ids and the texts of those that are not blank, and the ids of those that are."""
  good = [bool(text.strip()) for text in texts]
  kept = [each for each, is_good in zip(ids, good, strict=True) if is_good]
  said = [each for each, is_good in zip(texts, good, strict=True) if is_good]
  return kept, said, [each for each, is_good in zip(ids, good, strict=True) if not is_good]


def unopened(folder: Path) -> dict[str, tuple[int, str]]:
  """Returns, by suffix, how many pictures below a folder nothing here decodes, and the package that would."""
  needed = [
    (path.suffix.lower(), package) for path in paths.files_below(folder) if (package := formats.package_for(path))
  ]
  return {suffix: (count, package) for (suffix, package), count in Counter(needed).items()}
