"""Evaluation sets that TFDS does not have: a folder with `images/` and the table that the authors of a set publish."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from contrastive_jax.errors import UserError, nearest
from contrastive_jax.evaluation.tasks import ChoiceSet, PairSet
from contrastive_jax.preprocess.images import decode

Row = TypeVar("Row")


def karpathy(folder: pathlib.Path, split: str) -> PairSet:
  """Opens pictures and their captions by the table of Karpathy and Li, `<folder>/dataset_<folder>.json`.

  Args:
    folder: the folder that holds the table and the pictures.
    split: name of a split of the table.

  Raises:
    UserError: if something is missing, or the table is another one.
  """

  def rows_of(text: str) -> list[tuple[str, str, list[str]]]:
    entries = json.loads(text)["images"]
    return [
      (_text(row["split"]), _text(row["filename"]), [_text(said["raw"]) for said in row["sentences"]])
      for row in entries
    ]

  table = f"dataset_{folder.name}.json"
  rows = _read(folder, table, "the table of Karpathy and Li's splits", rows_of)
  splits = dict.fromkeys(row[0] for row in rows)
  if split not in splits:
    raise UserError(
      f"{folder / table} has no split {split!r}{nearest(split, splits)}, it has {', '.join(sorted(splits))}"
    )
  chosen = [(file, said) for of, file, said in rows if of == split]
  owner = np.repeat(np.arange(len(chosen)), [len(said) for _, said in chosen])
  captions = [text for _, said in chosen for text in said]
  return PairSet(folder.name, _Pictures(folder, [file for file, _ in chosen]), captions, np.arange(len(chosen)), owner)


def sugarcrepe(folder: pathlib.Path, subset: str) -> ChoiceSet:
  """Opens pictures with a true and a false caption by SugarCrepe's table (arXiv 2306.14610), `<folder>/<subset>.json`.

  Args:
    folder: the folder of the table and the pictures, which are those of COCO's validation split of 2017.
    subset: name of a part, such as "swap_obj".

  Raises:
    UserError: if something is missing, or the table is another one.
  """

  def rows_of(text: str) -> list[tuple[str, list[str]]]:
    return [
      (_text(row["filename"]), [_text(row["caption"]), _text(row["negative_caption"])])
      for row in json.loads(text).values()
    ]

  rows = _read(folder, f"{subset}.json", "SugarCrepe's table", rows_of)
  pictures = _Pictures(folder, [file for file, _ in rows])
  return ChoiceSet(f"{folder.name}/{subset}", pictures, [said for _, said in rows])


def winoground(folder: pathlib.Path) -> ChoiceSet:
  """Opens two pictures and two captions of the same words by Winoground's table (arXiv 2204.03162), `examples.jsonl`.

  Args:
    folder: the folder that holds the table and the pictures.

  Raises:
    UserError: if something is missing, or the table is another one.
  """

  def rows_of(text: str) -> list[tuple[list[str], list[str]]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [
      ([f"{row[f'image_{k}']}.png" for k in (0, 1)], [_text(row[f"caption_{k}"]) for k in (0, 1)]) for row in rows
    ]

  rows = _read(folder, "examples.jsonl", "Winoground's table", rows_of)
  pictures = _Pictures(folder, [file for files, _ in rows for file in files])
  return ChoiceSet(folder.name, pictures, [said for _, said in rows])


def _text(value: object) -> str:
  """Returns a value that has to be text, as a file name and a caption are.

  Raises:
    TypeError: if it is something else.
    ValueError: if it holds what no text has.
  """
  if not isinstance(value, str):
    raise TypeError(f"{value!r} in place of a text")
  if "\0" in value:
    raise ValueError(f"{value!r} in place of a text")
  value.encode()  # Refuses lone surrogates.
  return value


class _Pictures(Sequence):
  """Files in `images/`, read when asked for."""

  def __init__(self, folder: pathlib.Path, files: Sequence[str]):
    self._paths = [folder / "images" / file for file in files]
    missing = [path for path in dict.fromkeys(self._paths) if not path.is_file()]
    if missing:
      raise UserError(f"{missing[0]} and {len(missing) - 1} more pictures of {folder.name} are missing: put them there")

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> np.ndarray:
    return decode(self._paths[index])


def _read(folder: pathlib.Path, table: str, what: str, rows_of: Callable[[str], list[Row]]) -> list[Row]:
  path = folder / table
  if not path.is_file():
    raise UserError(
      f"the set {folder.name!r} is not in {folder.parent}, prepare it by hand: its pictures in {folder / 'images'} and "
      f"{what} as {path}"
    )
  try:
    rows = rows_of(path.read_text(encoding="utf-8"))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is not {what} ({error!r}): put that there") from error
  if not rows:
    raise UserError(f"{path} has no rows: put {what} there")
  return rows
