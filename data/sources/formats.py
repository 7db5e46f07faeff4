"""The formats of sets in shards, of which an index is built. A new one is a file in `data/sources` and a line here."""

import dataclasses
from collections.abc import Callable

from data.sources import huggingface, parquet, tfrecord, webdataset
from data.sources.index import Read
from data.sources.scan import Scan


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    scan: reads one of its files.
    suffix: how the names of its files mostly end.
    texts: fields that hold captions unless others are named, in the order in which they are looked for.
    read: reads the bytes of a picture of a file by the field of the picture and its offset, where these are not simply
      bytes of the file. The field is "" where none was named.
    files_in: lists the files of a folder; None takes those that end in `suffix`.
  """

  scan: Scan
  suffix: str
  texts: tuple[str, ...]
  read: Read | None = None
  files_in: Callable[[str], list[str]] | None = None


# The field that holds the number of a class, and no caption, in tars of webdataset.
CLASSES = "cls"
_COLUMNS = ("caption", "captions", "text", "texts", "sentences")

FORMATS = {
  "webdataset": Format(webdataset.scan, ".tar", ("txt", "text", "caption", "captions", CLASSES)),
  "tfrecord": Format(tfrecord.scan, ".tfrecord", ("caption", "captions", "text", "image/caption", "txt")),
  "parquet": Format(parquet.scan, ".parquet", _COLUMNS, read=parquet.read),
  "huggingface": Format(huggingface.scan, ".arrow", _COLUMNS, files_in=huggingface.files_in),
}
