"""A folder of pictures: with their captions in files beside them, or in a folder for each class."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.benchmarks import GENERIC, GENERIC_TEMPLATES
from contrastive_jax.evaluation.tasks import LabelledSet, ReadSet
from contrastive_jax.preprocess import formats
from contrastive_jax.preprocess.decoding import DecodeError
from data.sources import Text, stable_hash
from data.sources.features import distinct, read_texts
from data.sources.pictures import FilePictures, Shown, in_split, paired, place_and_split

# What may stand beside a picture, the first that is there is taken; and the keys of its captions in the latter.
_BESIDE = (".txt", ".json")
_KEYS = ("caption", "captions", "text")
# Names of folders that hold splits of a set, and not classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


class _FolderPictures(FilePictures):
  """Pictures below a folder, each named by its path there."""

  def __init__(self, name: str, folder: Path, split: str, pictures: Sequence[str], flip: bool):
    super().__init__(name, split, [folder / picture for picture in pictures], flip)
    self._folder = folder

  def sample_name(self, index: int) -> str:
    return paths.as_id(self._files[index].relative_to(self._folder).as_posix())


class FolderSource(_FolderPictures):
  """The pictures below a folder that have their captions in a file of the same name beside them.

  In `dog.txt` each line that is not blank is a caption of `dog.jpg`. `dog.json` is a text, a list of them, or an object
  with one of the two under "caption", "captions" or "text".
  """

  def __init__(self, name: str, folder: Path, split: str, pictures: Sequence[str], flip: bool):
    """Opens the pictures, given by their paths below the folder; no captions are read yet."""
    super().__init__(name, folder, split, pictures, flip)
    self._groups = [stable_hash("folder", os.fspath(folder), picture) for picture in pictures]

  def text(self, index: int) -> Text:
    file = next((file for end in _BESIDE if (file := self._files[index].with_suffix(end)).is_file()), None)
    if file is None:
      raise DecodeError(f"{self._files[index].stem}.txt is not beside it")
    captions = tuple(distinct(_captions_in(file)))
    if not captions:
      raise DecodeError(f"{file.name} holds no caption")
    return Text(captions, self._groups[index])


class ClassFolderSource(_FolderPictures):
  """The pictures below a folder that has a folder for each class, whose name is put into templates.

  Attributes:
    classes: the names of the classes, sorted: those of their folders, with blanks for underscores.
    labels: the class of each picture.
    templates: prompts in which `{}` stands for the class name.
  """

  shares_groups = True

  def __init__(
    self,
    name: str,
    folder: Path,
    split: str,
    pictures: Sequence[str],
    folders: Sequence[str],
    templates: Sequence[str],
    flip: bool,
  ):
    """Opens the pictures, given by their paths below the folder, of which `folders` are those of the classes.

    Raises:
      UserError: if the folders are splits, or no two classes, or one class has two of them.
    """
    super().__init__(name, folder, split, pictures, flip)
    if _SPLITS.issuperset(map(str.lower, folders)):
      raise UserError(f"{name} holds the splits {', '.join(folders)} and no classes: name one, {name}/{folders[0]}")
    self.classes = [paths.as_id(folder).replace("_", " ") for folder in folders]
    if len(folders) < 2:
      raise UserError(f"{name} has one class, {self.classes[0]!r}: give it a folder for each of several classes")
    twice = next((each for each, count in Counter(self.classes).items() if count > 1), None)
    if twice:
      raise UserError(f"{name} has two folders for the class {twice!r}: put their pictures into one, or rename one")
    self.labels = np.array([folders.index(Path(picture).parts[0]) for picture in pictures], np.int64)
    self.templates = tuple(templates)
    self._texts = [
      Text(tuple(template.replace("{}", words) for template in templates), stable_hash("folder", "class", words))
      for words in self.classes
    ]

  def text(self, index: int) -> Text:
    return self._texts[self.labels[index]]


def open_folder(
  place: str, *, templates: Sequence[str] = GENERIC_TEMPLATES, flip: bool = True
) -> FolderSource | ClassFolderSource:
  """Opens the pictures below a folder; where none has a file of captions beside it, the folders in it are classes.

  Hidden files and folders, and those that a Mac puts into archives, are left out. Pictures of types that nothing here
  decodes are there, and are bad records.

  Args:
    place: path of the folder. "@train" and "@test" behind it are splits, drawn by a hash of the pictures' paths.
    templates: prompts in which `{}` stands for the name of a class.
    flip: whether pictures may be mirrored; those whose captions name left or right never are.

  Raises:
    UserError: if there is no such folder, it holds no picture in the split, or pictures have neither caption nor class.
  """
  folder, split = place_and_split("folder/<folder>", place)
  name = f"folder/{place}"
  if not folder.is_dir():
    raise UserError(f"{name}: {folder} is no folder: name one that is there")
  files = [file for file in paths.files_below(folder) if not _is_hidden(file.relative_to(folder))]
  told = {file.with_suffix("") for file in files if file.suffix in _BESIDE}
  others = [file for file in files if file.suffix not in _BESIDE]
  readable = [file for file in others if formats.is_picture(file)]
  needed = {file: package for file in others if (package := formats.package_for(file))}
  if not readable:
    remedy = f", or pip install {min(needed.values())}" if needed else ""
    raise UserError(f"{name} holds no picture: put some there{remedy}")
  found = sorted({*readable, *needed})
  pictures = [file.relative_to(folder).as_posix() for file in found]
  chosen = [picture for picture in pictures if in_split(name, split, picture)]
  if not chosen:
    raise UserError(f"{name} holds none of the {len(pictures)} pictures of {folder}: leave the split out")
  if any(file.with_suffix("") in told for file in found):
    return FolderSource(name, folder, split, chosen, flip)
  alone = [picture for picture in pictures if "/" not in picture]
  if alone:
    raise UserError(
      f"{name}: {alone[0]} and {len(alone) - 1} more pictures have no caption: put {Path(alone[0]).stem}.txt beside it,"
      " or the pictures of each class in a folder of its name"
    )
  # Of all pictures, since every split has the same classes.
  folders = sorted({Path(picture).parts[0] for picture in pictures})
  return ClassFolderSource(name, folder, split, chosen, folders, templates, flip)


def evaluated(source: FolderSource | ClassFolderSource) -> ReadSet:
  """Returns what reads a source as an evaluation set: for zero-shot classification if it has classes, or retrieval."""
  if isinstance(source, FolderSource):
    return paired(source)
  return lambda: LabelledSet(
    source.name, Shown(source, {}), source.labels, source.classes, source.templates, templates_source=GENERIC
  )


def _is_hidden(path: Path) -> bool:
  return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _captions_in(file: Path) -> list[str]:
  try:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".txt":
      return [line.strip() for line in text.split("\n")]
    said: Any = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DecodeError(f"{file.name} cannot be read ({' '.join(str(error).split())[:100]})") from error
  if isinstance(said, dict):
    said = next((said[key] for key in _KEYS if key in said), None)
    if said is None:
      raise DecodeError(f"{file.name} has none of the keys {', '.join(_KEYS)}")
  return read_texts(said)
