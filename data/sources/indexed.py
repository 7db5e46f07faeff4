"""A set in shards, read by its index."""

from collections.abc import Mapping

import numpy as np

from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from data import files
from data.sources import Text, stable_hash, weighted
from data.sources.formats import FORMATS
from data.sources.index import Index
from data.sources.keep import Filter
from data.sources.pictures import PictureSource, check_split, drawn

# Columns that a filter may always name.
_MEASURED = ("width", "height", "size")
# How the folder of an index is called, beside the files that it is of.
INDEX_SUFFIX = ".index"
_FOLDED = str.maketrans({"{": None, "}": None, "*": "all", "?": "x", "[": None, "]": None, "/": "+"})


class IndexedSource(PictureSource):
  """The samples of a set in shards, of all or of those that a split and a filter keep."""

  def __init__(
    self,
    kind: str,
    place: str,
    *,
    index: str = "",
    caption_key: str | Mapping[str, float] = "",
    filter: str = "",
    flip: bool = True,
  ):
    """Opens the index of the set.

    Args:
      kind: the kind of the set, one of `FORMATS`.
      place: its files, as `data.files.expand` reads them, or the folder of its index; with "@train" or "@test" behind
        it those samples that a hash of their names gives the split.
      index: the folder of the index; "" is where `data.index` puts it.
      caption_key: field of the captions, or weights of several fields, of which one is drawn by its weight among those
        that a sample has; "" is the first of those that the index holds.
      filter: the samples that are kept, as `keep.Filter` reads it; "" keeps all.
      flip: whether pictures may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if there is no index, it does not fit the files or has not what is asked for, or no sample is kept.
    """
    files_named, split = place_and_split(place)
    name = f"{kind}/{place}"
    super().__init__(name, split, flip)
    check_split(name, split)
    self._index = Index(index or index_folder(files_named), f"python -m data.index '{kind}/{files_named}'")
    if self._index.kind != kind:
      raise UserError(f"{name}: {self._index.folder} is the index of a set of kind {self._index.kind}: name it so")
    self._read = FORMATS[kind].read
    self._check_files(files_named)
    self._fields = self._weighted(caption_key)
    self._group = f"{kind}/{files_named}"
    self._rows = self._kept(filter)

  def __len__(self) -> int:
    return len(self._index) if self._rows is None else len(self._rows)

  def text(self, index: int) -> Text:
    row = self._row(index)
    found = [(weight, self._index.value(field, row)) for field, weight in self._fields.items()]
    found = [(weight, captions) for weight, captions in found if captions]
    if not found:
      raise DecodeError(f"it has no caption in {' or '.join(self._fields)}")
    return weighted(found, stable_hash(self._group, self._index.value("file", row), self._index.value("key", row)))

  def picture(self, index: int, background: tuple[int, int, int] | None = None) -> np.ndarray:
    row = self._row(index)
    try:
      data = self._index.read(row, self._read)
    except FileNotFoundError:
      raise DecodeError(f"{self._index.file_of(row)} is missing") from None
    if channels := self._index.value("channels", row):
      shape = self._index.value("height", row), self._index.value("width", row), channels
      return decode(np.frombuffer(data, np.uint8).reshape(shape), background)
    return decode(data, background)

  def shard_of(self, index: int) -> str:
    return self._index.file_of(self._row(index))

  def _row(self, index: int) -> int:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name} has {len(self)} samples")
    return index if self._rows is None else int(self._rows[index])

  def _check_files(self, named: str) -> None:
    """Refuses an index that is of other files than the set's name, or whose files have changed."""
    if not named.endswith(INDEX_SUFFIX):
      indexed = {each.file for each in self._index.files} | set(self._index.damaged)
      found = set(files_of(self._index.kind, named))
      for more, fewer, what in ((found, indexed, "does not know"), (indexed, found, "knows also")):
        if other := sorted(more - fewer):
          raise UserError(
            f"{self._index.folder} {what} {len(other)} files, such as {other[0]}: build it anew with"
            f" python -m data.index '{self._index.kind}/{named}'"
          )
    self._index.check_files(self._read)

  def _weighted(self, caption_key: str | Mapping[str, float]) -> dict[str, float]:
    if not caption_key:
      return {self._index.texts[0]: 1.0}
    fields = {caption_key: 1.0} if isinstance(caption_key, str) else dict(caption_key)
    for field in fields:
      if field not in self._index.texts:
        raise UserError(
          f"{self.name}: its index has no captions in {field!r}{nearest(field, self._index.texts)}, but in"
          f" {', '.join(self._index.texts)}: name one of them with caption_key, or index it with --texts={field}"
        )
    return fields

  def _kept(self, text: str) -> np.ndarray | None:
    known = (*_MEASURED, *self._index.columns)
    chosen = Filter(text, known, self.name) if text else None
    names = [*(chosen.columns if chosen else ()), *(["draw"] if self.split else ())]
    if not names:
      return None
    # Only what is filled of it takes memory.
    rows = np.empty(len(self._index), np.uint32 if len(self._index) < 2**32 else np.int64)
    start = count = 0
    for parts in zip(*(self._index.values(name) for name in names), strict=True):
      columns = dict(zip(names, parts, strict=True))
      keep = chosen.kept(columns) if chosen else np.ones(len(parts[0]), bool)
      if self.split:
        keep &= drawn(self.split, columns["draw"].to_numpy())
      kept = np.flatnonzero(keep)
      rows[count : count + len(kept)] = start + kept
      start, count = start + len(keep), count + len(kept)
    rows = rows[:count]
    if not len(rows):
      what = " and ".join([f"the filter {text!r}"] * bool(text) + [f"the split {self.split!r}"] * bool(self.split))
      raise UserError(f"{self.name}: {what} keeps none of {len(self._index):,} samples: name another")
    return rows


def place_and_split(place: str) -> tuple[str, str]:
  """Returns the files and the split, or "", of which the name of a set in shards consists."""
  named, at, split = place.rpartition("@")
  return (named, split) if at and split.isidentifier() else (place, "")


def index_folder(named: str) -> str:
  """Returns where the index of a set is put: beside its files, under the name of the set.

  Examples:
    >>> index_folder("photos/{000..123}.tar"), index_folder("photos/a.index")
    ('photos/000..123.tar.index', 'photos/a.index')
  """
  if named.endswith(INDEX_SUFFIX):
    return named
  parts = named.rstrip("/").split("/")
  magic = next((number for number, part in enumerate(parts) if set(part) & set("{*?[")), len(parts) - 1)
  name = "/".join(parts[magic:]).translate(_FOLDED)
  return "/".join([*parts[:magic], name + INDEX_SUFFIX])


def files_of(kind: str, named: str) -> list[str]:
  """Returns the files of a set: those that a pattern names, or those in a folder that end as its kind does."""
  suffix, files_in = FORMATS[kind].suffix, FORMATS[kind].files_in
  if files_in and files.is_folder(named):
    return files_in(named)
  found = files.expand(f"{named.rstrip('/')}/*{suffix}" if files.is_folder(named) else named)
  return [file for file in found if not file.endswith(INDEX_SUFFIX)]
