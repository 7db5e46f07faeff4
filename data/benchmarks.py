"""Opens a standard benchmark as an evaluation set: the TFDS set it names, or a folder of pictures."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import benchmarks
from contrastive_jax.evaluation.benchmarks import Benchmark
from contrastive_jax.evaluation.tasks import LabelledSet, MultiLabelSet, ReadSet
from contrastive_jax.preprocess.decoding import DecodeError
from data import picture_folders
from data.sources import tfds
from data.sources.answers import answers, refuse_most, when_scored


def opened(benchmark: Benchmark, data_dir: str | None, split: str) -> ReadSet:
  """Opens a benchmark, and returns a function that reads its labels or captions.

  Args:
    benchmark: an entry of `BENCHMARKS`.
    data_dir: TFDS's directory of sets, which also has the folders of pictures; None is TFDS's own default.
    split: the split in TFDS's notation, or one that the table of a folder has.

  Raises:
    UserError: if the set is not there, lacks the split, or was prepared with other labels.
  """
  kinds = {"classification": _labelled, "multilabel": _multilabel, "retrieval": _paired, "choices": _choices}
  return kinds[benchmark.kind](benchmark, data_dir, split)


def _labelled(benchmark: Benchmark, data_dir: str | None, split: str) -> ReadSet:
  records, names, class_of = _opened(benchmark, data_dir, split)
  label = benchmark.label or int

  def class_of_record(record: Mapping[str, Any]) -> int:
    value = label(record[benchmark.label_key])
    if not 0 <= value < len(class_of) or class_of[value] < 0:
      raise DecodeError(f"label {value} is none of {len(names)} classes")
    return int(class_of[value])

  def read() -> LabelledSet:
    labels, bad = answers(records, class_of_record, 0)
    _refuse_most(benchmark, split, bad, len(records), len(names))
    images = tfds.Images(records, benchmark.image_key, benchmark.pixel_scale, bad)
    templates, source = benchmarks.templates(benchmark)
    return LabelledSet(benchmark.name, images, np.array(labels, np.int64), names, templates, templates_source=source)

  return when_scored(records, class_of_record, read)


def _refuse_most(benchmark: Benchmark, split: str, bad: dict[int, str], count: int, classes: int) -> None:
  remedy = f"without one of the {classes} classes of {benchmark.name!r}: name another split"
  refuse_most(bad, count, f"split {split!r} of the TFDS set {benchmark.tfds!r}", remedy)


def _multilabel(benchmark: Benchmark, data_dir: str | None, split: str) -> ReadSet:
  records, names, class_of = _opened(benchmark, data_dir, split)

  def classes_of_record(record: Mapping[str, Any]) -> np.ndarray:
    values = np.asarray(record[benchmark.label_key], int).reshape(-1)
    strange = [value for value in values.tolist() if not 0 <= value < len(class_of)]
    if strange:
      raise DecodeError(f"label {strange[0]} is none of {len(names)} classes")
    row = np.zeros(len(names), bool)
    chosen = class_of[values]
    row[chosen[chosen >= 0]] = True
    return row

  def read() -> MultiLabelSet:
    rows, bad = answers(records, classes_of_record, np.zeros(len(names), bool))
    _refuse_most(benchmark, split, bad, len(records), len(names))
    labels = np.array(rows, bool).reshape(len(records), len(names))
    images = tfds.Images(records, benchmark.image_key, benchmark.pixel_scale, bad)
    templates, source = benchmarks.templates(benchmark)
    return MultiLabelSet(benchmark.name, images, labels, names, templates, templates_source=source)

  return when_scored(records, classes_of_record, read)


def _paired(benchmark: Benchmark, data_dir: str | None, split: str) -> ReadSet:
  if not benchmark.tfds:
    read = picture_folders.karpathy(_folder(benchmark.name, data_dir), split)
    return lambda: read
  keys = {"image_key": benchmark.image_key, "caption_key": benchmark.label_key}
  return tfds.paired(benchmark.tfds, data_dir, split, **keys)


def _choices(benchmark: Benchmark, data_dir: str | None, split: str) -> ReadSet:
  if split != benchmark.split:
    raise UserError(f"{benchmark.name!r} has no split {split!r}, it has {benchmark.split}")
  name, _, subset = benchmark.name.partition("/")
  folder = _folder(name, data_dir)
  read = picture_folders.sugarcrepe(folder, subset) if subset else picture_folders.winoground(folder)
  return lambda: read


def _folder(name: str, data_dir: str | None) -> pathlib.Path:
  return paths.typed("data_dir", data_dir or tfds.default_data_dir()) / name


def _opened(benchmark: Benchmark, data_dir: str | None, split: str) -> tuple[tfds.Records, list[str], np.ndarray]:
  """Returns the records, the class names, and the class of each label."""
  records = tfds.Records(benchmark.tfds, data_dir, split)
  records.require(benchmark.image_key, benchmark.label_key)
  labels = records.label_names(benchmark.label_key) if benchmark.label is None else None
  return records, *benchmarks.name_classes(benchmark, labels)
