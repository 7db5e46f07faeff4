"""Sources of pictures with captions of one's own, and the splits that are drawn of them."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.evaluation.tasks import PairSet, ReadSet
from contrastive_jax.preprocess.decoding import DecodeError, read_file
from contrastive_jax.preprocess.images import WHITE, decode
from data.sources import Example, Text, names_a_side, stable_hash
from data.sources.answers import answers, pair_set, refuse_most

Draws = TypeVar("Draws", int, np.ndarray)
# Of the splits that are drawn where a set tells none of its own: "test" is every tenth picture, "train" the others.
SPLITS = ("train", "test")
_TEST_OF_A_THOUSAND = 100
# Pictures that are looked for when a set is opened: where most are missing, another folder is meant.
_GLANCE = 64


@runtime_checkable
class StoredPictures(Protocol):
  """A set whose pictures can be had as they are stored; `PictureSource` explains its members."""

  name: str
  shares_groups: bool

  def __len__(self) -> int: ...

  def text(self, index: int) -> Text: ...

  def stored(self, index: int) -> bytes | np.ndarray: ...

  def sample_name(self, index: int) -> str: ...


class PictureSource(abc.ABC):
  """Pictures with captions; where they are is for the format to say.

  Attributes:
    name: name of the set, with its split.
    split: the split, or "".
    shares_groups: whether pictures that show the same thing, such as those of a class, are of one group.
  """

  shares_groups = False

  def __init__(self, name: str, split: str, flip: bool):
    """Keeps what all such sources have.

    Args:
      name: name of the set, with its split.
      split: the split, or "".
      flip: whether pictures may be mirrored; those whose captions name left or right never are.
    """
    self.name, self.split, self._flip = name, split, flip

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of pictures."""

  @abc.abstractmethod
  def text(self, index: int) -> Text:
    """Returns the captions of a picture; raises `DecodeError` where it has none."""

  @abc.abstractmethod
  def stored(self, index: int) -> bytes | np.ndarray:
    """Returns a picture as it is stored, the bytes of a file or pixels, so that `images.decode` takes it.

    Raises:
      DecodeError: if it is not there.
      OSError: if it cannot be read.
    """

  @abc.abstractmethod
  def sample_name(self, index: int) -> str:
    """Returns what names a picture within the set, such as its path, wherever the set lies."""

  @abc.abstractmethod
  def shard_of(self, index: int) -> str:
    """Returns the file that holds a picture."""

  def picture(self, index: int, background: tuple[int, int, int] | None = None) -> np.ndarray:
    """Returns a picture as `images.decode` does.

    Raises:
      DecodeError: if it is not there, or is none that can be decoded.
      OSError: if it cannot be read.
    """
    return decode(self.stored(index), background)

  def __getitem__(self, index: int, /) -> Example:
    text = self.text(index)
    return Example(self.picture(index), text, index, self._flip and not names_a_side(text.captions))


class FilePictures(PictureSource):
  """Pictures in files of their own."""

  def __init__(self, name: str, split: str, files: Sequence[Path], flip: bool):
    """Looks for a few of the files.

    Args:
      name: name of the set, with its split.
      split: the split, or "".
      files: paths of the pictures.
      flip: whether pictures may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if most of the files are not there.
    """
    super().__init__(name, split, flip)
    self._files = files
    looked_for = files[:: max(1, -(-len(files) // _GLANCE))]
    missing = [file for file in looked_for if not file.exists()]
    if 2 * len(missing) >= len(looked_for):
      raise UserError(
        f"{self.name}: {len(missing)} of {len(looked_for)} pictures that were looked for are missing, such as"
        f" {missing[0]}: put them there, or say with root which folder the paths start from"
      )

  def __len__(self) -> int:
    return len(self._files)

  def stored(self, index: int) -> bytes:
    try:
      return read_file(self._files[index])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
      raise DecodeError(f"{self._files[index]} is missing") from None

  def shard_of(self, index: int) -> str:
    return str(self._files[index])


class Shown(Sequence):
  """The pictures of a source as evaluation shows them; those whose answer is bad cannot be read either."""

  def __init__(self, source: PictureSource, bad: dict[int, str]):
    self._source, self._bad = source, bad

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> np.ndarray:
    if index in self._bad:
      raise DecodeError(self._bad[index])
    return self._source.picture(index, WHITE)


def paired(source: PictureSource) -> ReadSet:
  """Returns what reads the captions of a source and returns it as a set for retrieval.

  A picture belongs with all its captions. One without a caption is a bad record, which the evaluation leaves out.
  """

  def read() -> PairSet:
    found, bad = answers(range(len(source)), lambda index: list(source.text(index).captions), [])
    refuse_most(bad, len(source), source.name, "without a caption, the first is number {first} ({why})")
    return pair_set(source.name, Shown(source, bad), found)

  return read


def place_and_split(kind: str, text: str) -> tuple[Path, str]:
  """Returns the path and the split, or "", of which the name of a set consists, as in "photos/captions.csv@test".

  Args:
    kind: how the name of such a set is written, for errors.
    text: the name behind its kind. A path that is there may hold an "@".
  """
  whole = paths.typed(kind, text)
  place, at, split = text.rpartition("@")
  if not at or whole.exists():
    return whole, ""
  return paths.typed(kind, place), split


def in_split(name: str, split: str, picture: str) -> bool:
  """Says whether a picture is in a split that is drawn: by a hash of its path, so that it stays where it is for good.

  Args:
    name: name of the set, for errors.
    split: one of `SPLITS`; "" holds every picture.
    picture: the path as the set names it.

  Raises:
    UserError: for another split.
  """
  check_split(name, split)
  return not split or drawn(split, draw_of(picture))


def check_split(name: str, split: str) -> None:
  """Raises a `UserError` for a split that is none of `SPLITS`, nor ""."""
  if split and split not in SPLITS:
    raise UserError(
      f"{name} has no split {split!r}{nearest(split, SPLITS)}: name @train or @test, which are drawn by a hash of the"
      " pictures' paths, or none"
    )


def draw_of(picture: str) -> int:
  """Returns the number from 0 to 999 that a picture draws by its path, for good."""
  return stable_hash("split", picture) % 1000


def drawn(split: str, draws: Draws) -> Draws:
  """Says for each number that a picture has drawn whether it is in a split, one of `SPLITS`."""
  return (draws < _TEST_OF_A_THOUSAND) == (split == "test")
