"""The formats of sets in shards, of which an index is built. A new one is a file in `data/sources` and a line here."""

import dataclasses

from data.sources import tfrecord, webdataset
from data.sources.scan import Scan


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    scan: reads one of its files.
    suffix: how the names of its files mostly end.
    texts: fields that hold captions unless others are named, in the order in which they are looked for.
  """

  scan: Scan
  suffix: str
  texts: tuple[str, ...]


FORMATS = {
  "webdataset": Format(webdataset.scan, ".tar", ("txt", "text", "caption", "captions")),
  "tfrecord": Format(tfrecord.scan, ".tfrecord", ("caption", "captions", "text", "image/caption", "txt")),
}
