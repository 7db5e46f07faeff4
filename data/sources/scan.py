"""What a format finds in one of its files: where the bytes of each picture lie, and what is said of it.

A format whose samples lie in shards is a `Scan`; everything else about its sets is the same, see `data.sources.index`.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Place(NamedTuple):
  """Where in its file the bytes of a picture are."""

  offset: int
  size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
  """A sample of a file.

  Attributes:
    key: its name, which need not differ from those in other files.
    picture: the bytes of its picture.
    place: where these lie.
    said: the texts and numbers that belong to it, by the names of their fields.
    raw: height, width and channels where the bytes are the uint8 pixels themselves.
  """

  key: str
  picture: bytes
  place: Place
  said: Mapping[str, Any]
  raw: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
  """A sample that cannot be used.

  Attributes:
    key: its name.
    why: the reason, in words that many such samples share.
  """

  key: str
  why: str


class DamagedFile(ValueError):
  """A file that cannot be read to its end; the message is the end of a sentence, such as "it is cut at byte 512"."""


@runtime_checkable
class Scan(Protocol):
  """Reads a file front to back."""

  def __call__(self, stream: io.BufferedReader, image_key: str, fields: frozenset[str]) -> Iterator[Found | LeftOut]:
    """Yields what the file holds, in its order.

    Args:
      stream: the file, which can be sought.
      image_key: field of the picture; "" is the only one that holds pictures.
      fields: names of the fields that are asked for. A format need not tell others.

    Raises:
      DamagedFile: if the file is none of its kind or damaged.
      UserError: if `image_key` has to be named, or names nothing.
    """
    ...
