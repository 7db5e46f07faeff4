"""What the records of a source hold: sizes, captions, scripts, what occurs again and what cannot be read."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from contrastive_jax import progress
from contrastive_jax.bad_records import retried
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.video import Clip
from data.sources import Example, Source
from data.substitution import shard_of

# Records between two updates of the progress bar.
_CHUNK = 16
# Letters that decide the script of a caption: those of a long one are all of a kind, or the first tell which mixture.
_MOST_LETTERS = 2000


@dataclasses.dataclass(frozen=True)
class Record:
  """One record that was looked at.

  Attributes:
    index: its number in the source.
    file: the file that holds it, "" where the source does not say.
    reason: why it cannot be read; "" where it can be, and all that follows is told.
    width: width of its picture in pixels.
    height: height of its picture in pixels.
    frames: number of frames of a clip; 1 for an image.
    digest: a hash of its pixels; of a clip those of its first, middle and last frame.
    captions: its captions.
  """

  index: int
  file: str
  reason: str = ""
  width: int = 0
  height: int = 0
  frames: int = 1
  digest: str = ""
  captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Script:
  """A writing system.

  Attributes:
    name: its name, such as "Latin"; "" for captions without letters.
    captions: number of captions most of whose letters are of it.
    example: one of them.
  """

  name: str
  captions: int
  example: str


@dataclasses.dataclass(frozen=True)
class Survey:
  """The records of a source that were looked at.

  Attributes:
    total: number of records of the source.
    records: those that were looked at, in order.
  """

  total: int
  records: tuple[Record, ...]

  @functools.cached_property
  def good(self) -> list[Record]:
    """The records that can be read."""
    return [record for record in self.records if not record.reason]

  @functools.cached_property
  def bad(self) -> list[Record]:
    """The records that cannot be read."""
    return [record for record in self.records if record.reason]

  @functools.cached_property
  def captions(self) -> list[str]:
    """The captions of all records in order; one that stands in several records is there as often."""
    return [caption for record in self.good for caption in record.captions]

  @functools.cached_property
  def same_pictures(self) -> list[list[Record]]:
    """The records whose pixels are the same, those that occur most often first."""
    found: dict[str, list[Record]] = collections.defaultdict(list)
    for record in self.good:
      found[record.digest].append(record)
    return sorted((records for records in found.values() if len(records) > 1), key=lambda records: -len(records))

  @functools.cached_property
  def same_captions(self) -> list[tuple[str, int]]:
    """The captions that stand in several records, and in how many; the most frequent first."""
    counts = collections.Counter(caption for record in self.good for caption in set(record.captions))
    return [(caption, count) for caption, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if count > 1]

  @functools.cached_property
  def scripts(self) -> list[Script]:
    """The scripts of the captions, the most frequent first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for caption in self.captions:
      found[script_of(caption)].append(caption)
    scripts = [Script(name, len(captions), captions[0]) for name, captions in found.items()]
    return sorted(scripts, key=lambda script: (-script.captions, script.name))


def survey(source: Source, count: int, *, threads: int = 0) -> Survey:
  """Reads records that are evenly spread over a source, with a progress bar.

  Args:
    source: the source.
    count: number of records; those of a smaller source are all read.
    threads: number of threads that read; 0 reads in this one.

  Raises:
    OSError: if a record cannot be read after several attempts.
  """
  count = min(count, len(source))
  numbers = [k * len(source) // count for k in range(count)]
  chunks = (np.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
  read = functools.partial(look_at, source)
  with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
    each = pool.map if threads else map
    return Survey(len(source), tuple(_read(each, read, numbers, chunks, source.name)))


def _read(each, read, numbers: Sequence[int], chunks: Iterator[np.ndarray], name: str) -> Iterator[Record]:
  for rows in progress.shown(chunks, len(numbers), "records", name):
    yield from each(read, [numbers[row] for row in rows])


def look_at(source: Source, index: int) -> Record:
  """Reads one record and keeps what is to be known of it."""

  def read() -> tuple[Example, np.ndarray]:
    example = source[index]
    image = example.image
    if isinstance(image, Clip):
      return example, image.read([0, image.count // 2, image.count - 1])
    return example, image[None]

  file = shard_of(source, index)
  try:
    example, frames = retried(read)
  except DecodeError as error:
    return Record(index, file, str(error))
  digest = hashlib.blake2b(repr(frames.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(frames))
  height, width = frames.shape[1:3]
  count = example.image.count if isinstance(example.image, Clip) else 1
  return Record(index, file, "", width, height, count, digest.hexdigest(), example.text.captions)


def script_of(text: str) -> str:
  """Returns the script of most of a text's letters, by their names in Unicode; "" where there are none.

  Examples:
    >>> script_of("a red fox, 7"), script_of("красная лиса"), script_of("狐"), script_of("7!")
    ('Latin', 'Cyrillic', 'Han', '')
  """
  letters = (c for c in unicodedata.normalize("NFKC", text[:_MOST_LETTERS]) if unicodedata.category(c)[0] == "L")
  counts = collections.Counter(map(_script_of_letter, letters))
  return max(counts, key=lambda name: (counts[name], name), default="")


@functools.cache
def _script_of_letter(letter: str) -> str:
  first, *rest = unicodedata.name(letter, "OTHER").replace("-", " ").split()
  # "Old Turkic", "New Tai Lue": the first word alone names no script.
  name = " ".join([first, *(rest[:1] if first in ("OLD", "NEW", "TAI") else [])])
  return "Han" if name == "CJK" else name.title()
