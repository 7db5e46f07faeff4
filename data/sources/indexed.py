"""A set in shards, read by its index."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.evaluation.benchmarks import GENERIC, GENERIC_TEMPLATES
from contrastive_jax.evaluation.tasks import LabelledSet, ReadSet
from contrastive_jax.preprocess.decoding import DecodeError
from data import tables
from data.files import Files, is_folder, whole
from data.sources import Text, in_order, stable_hash, weighted
from data.sources.answers import answers, refuse_most
from data.sources.columns import weight_of
from data.sources.features import distinct
from data.sources.formats import CLASSES, FORMATS
from data.sources.index import Index
from data.sources.keep import Filter
from data.sources.pictures import PictureSource, Shown, check_split, drawn, paired

# Columns that a filter may always name.
_MEASURED = ("width", "height", "size")
# A column that tells the group of each sample, where several samples of a set share one; see `data.converting`.
GROUP = "pair_group"
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
    group_key: str = "",
    weight_key: str = "",
    wrong_caption_key: str = "",
    classes: str = "",
    templates: Sequence[str] = GENERIC_TEMPLATES,
    flip: bool = True,
    reader: Files | None = None,
  ):
    """Opens the index of the set.

    Args:
      kind: the kind of the set, one of `FORMATS`.
      place: its files, as `data.files.expand` reads them, or the folder of its index; with "@train" or "@test" behind
        it those samples that a hash of their names gives the split.
      index: the folder of the index; "" is where `data.index` puts it.
      caption_key: field of the captions, or weights of several fields, of which one is drawn by its weight among those
        that a sample has; "" is the first of those that a sample has, in the order of the index.
      filter: the samples that are kept, as `keep.Filter` reads it; "" keeps all.
      group_key: column of what a picture shows, such as a product: samples of one value are never each other's
        negatives; "" lets each stand for itself.
      weight_key: column of how much a pair counts; "" is 1 for all.
      wrong_caption_key: field of captions that nearly fit the picture and are wrong; "" is none.
      classes: a file with the names of classes, one a line, where the field of captions holds their numbers.
      templates: prompts in which `{}` stands for the name of a class.
      flip: whether pictures may be mirrored; those whose captions name left or right never are.
      reader: reads files; None is one without a cache.

    Raises:
      UserError: if there is no index, it does not fit the files or has not what is asked for, or no sample is kept.
    """
    files_named, split = place_and_split(place)
    name = f"{kind}/{place}"
    super().__init__(name, split, flip)
    check_split(name, split)
    self._files = reader or Files()
    self._command = f"python -m data.index '{kind}/{files_named}'"
    self._index = Index(index or index_folder(files_named), self._command, self._files)
    if self._index.kind != kind:
      raise UserError(f"{name}: {self._index.folder} is the index of a set of kind {self._index.kind}: name it so")
    self._read = FORMATS[kind].read
    self._check_files(files_named)
    self.weight_key, self.wrong_caption_key = weight_key, wrong_caption_key
    self._fields = self._weighted(caption_key or (CLASSES if classes else ""))
    self.classes, self.templates = self._class_names(classes), tuple(templates)
    for column, known, flag in (
      (group_key, self._index.columns, "columns"),
      (weight_key, self._index.columns, "columns"),
      (wrong_caption_key, self._index.texts, "texts"),
    ):
      if column and column not in known:
        raise UserError(
          f"{name}: its index has no {'column' if flag == 'columns' else 'captions in'} {column!r}"
          f"{nearest(column, known)}: index it with --{flag}={column}"
        )
    self._group_key = group_key
    self._takes_first = not caption_key
    self._group = f"{kind}/{files_named}"
    self._is_grouped = GROUP in self._index.columns
    self.shares_groups = self._is_grouped or bool(group_key) or self.classes is not None
    self._rows = self._kept(filter)

  def __len__(self) -> int:
    return len(self._index) if self._rows is None else len(self._rows)

  def text(self, index: int) -> Text:
    row = self._row(index)
    found = [(weight, self._index.value(field, row)) for field, weight in self._fields.items()]
    found = [(weight, captions) for weight, captions in found if captions]
    if not found:
      raise DecodeError(f"it has no caption in {' or '.join(self._fields)}")
    if self.classes is not None:
      words = self.classes[self._label(found[0][1])]
      captions = tuple(template.replace("{}", words) for template in self.templates)
      text = Text(captions, stable_hash(self._group, "class", words))
    else:
      text = weighted(found[:1] if self._takes_first else found, self._group_of(row))
    beside = {}
    if self.weight_key:
      beside["weight"] = weight_of(self._index.value(self.weight_key, row), self.weight_key)
    if self.wrong_caption_key:
      beside["wrong"] = tuple(distinct(self._index.value(self.wrong_caption_key, row) or ()))
    return dataclasses.replace(text, **beside) if beside else text

  def label(self, index: int) -> int:
    """Returns the number of the class of a sample of a set with classes; raises `DecodeError` where it has none."""
    (field,) = self._fields
    return self._label(self._index.value(field, self._row(index)) or [""])

  def stored(self, index: int) -> bytes | np.ndarray:
    row = self._row(index)
    try:
      data = self._index.read(row, self._read)
    except FileNotFoundError:
      raise DecodeError(f"{self._index.file_of(row)} is missing") from None
    if channels := self._index.value("channels", row):
      shape = self._index.value("height", row), self._index.value("width", row), channels
      return np.frombuffer(data, np.uint8).reshape(shape)
    return data

  def sample_name(self, index: int) -> str:
    row = self._row(index)
    return f"{os.path.relpath(self._index.file_of(row), self._common)}/{self._index.value('key', row)}"

  def shard_of(self, index: int) -> str:
    return self._index.file_of(self._row(index))

  def _label(self, written: Sequence[str]) -> int:
    if len(written) != 1 or not written[0].isdecimal() or int(written[0]) >= len(self.classes):
      raise DecodeError(f"its class {' '.join(written)!r} is none of {len(self.classes)}, counted from 0")
    return int(written[0])

  def _group_of(self, row: int) -> int:
    if self._group_key:
      value = self._index.value(self._group_key, row)
      if value is not None:
        return stable_hash(self._group, self._group_key, value)
    if self._is_grouped and isinstance(group := self._index.value(GROUP, row), int):
      return group
    return stable_hash(self._group, self._index.file_number(row), self._index.value("key", row))

  def _class_names(self, file: str) -> list[str] | None:
    if not file:
      if CLASSES in self._fields:
        raise UserError(f"{self.name}: {CLASSES!r} holds numbers of classes: name the file of their names with classes")
      return None
    if len(self._fields) > 1:
      raise UserError(f"{self.name}: captions come from classes={file!r} or from several fields: leave one out")
    names = tables.lines(paths.typed(f"classes of {self.name!r}", file))
    if not names or not all(name.strip() for name in names) or len(set(names)) < len(names):
      raise UserError(f"{file} must have the name of a class in every line, each once")
    return names

  def _row(self, index: int) -> int:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name} has {len(self)} samples")
    return index if self._rows is None else int(self._rows[index])

  @functools.cached_property
  def _common(self) -> str:
    """The folder that holds all files of the set."""
    return os.path.commonpath([os.path.dirname(each.file) for each in self._index.files])

  def _check_files(self, named: str) -> None:
    """Refuses an index that is of other files than the set's name, or whose files have changed."""
    if not named.endswith(INDEX_SUFFIX):
      indexed = {each.file for each in self._index.files} | set(self._index.damaged)
      found = set(files_of(self._index.kind, named, self._files))
      for more, fewer, what in ((found, indexed, "does not know"), (indexed, found, "knows also")):
        if other := sorted(more - fewer):
          raise UserError(
            f"{self._index.folder} {what} {len(other)} files, such as {other[0]}: build it anew with {self._command}"
          )
    self._index.check_files(self._read)

  def _weighted(self, caption_key: str | Mapping[str, float]) -> dict[str, float]:
    if not caption_key:
      captions = [field for field in self._index.texts if field not in (CLASSES, self.wrong_caption_key)]
      return dict.fromkeys(captions or self._index.texts, 1.0)
    fields = {caption_key: 1.0} if isinstance(caption_key, str) else in_order(caption_key)
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


def evaluated(source: IndexedSource) -> ReadSet:
  """Returns what reads a source as an evaluation set: for zero-shot classification if it has classes, or retrieval."""
  if source.classes is None:
    return paired(source)

  def read() -> LabelledSet:
    labels, bad = answers(range(len(source)), source.label, 0)
    refuse_most(bad, len(source), source.name, "without a class, the first is number {first} ({why})")
    images = Shown(source, bad)
    return LabelledSet(
      source.name, images, np.array(labels, np.int64), source.classes, source.templates, templates_source=GENERIC
    )

  return read


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


def files_of(kind: str, named: str, reader: Files) -> list[str]:
  """Returns the files of a set: those that a pattern names, or those in a folder that end as its kind does."""
  suffix, files_in = FORMATS[kind].suffix, FORMATS[kind].files_in
  if files_in and is_folder(named):
    return files_in(named)
  found = reader.expand(f"{named.rstrip('/')}/*{suffix}" if is_folder(named) else named)
  return [whole(file) for file in found if not file.endswith(INDEX_SUFFIX)]
