"""Opens a standard benchmark as an evaluation set: the TFDS set it names, or a folder of pictures."""

import pathlib

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import benchmarks
from contrastive_jax.evaluation.benchmarks import Benchmark
from contrastive_jax.evaluation.tasks import ChoiceSet, EvaluationSet, LabelledSet, MultiLabelSet, PairSet
from data import picture_folders
from data.sources import tfds


def load(benchmark: Benchmark, data_dir: str | None, split: str) -> EvaluationSet:
  """Opens a benchmark.

  Args:
    benchmark: of `BENCHMARKS`.
    data_dir: TFDS's directory of sets, which also has the folders of pictures; None is TFDS's own default.
    split: in TFDS's notation, or one that the table of a folder has.

  Raises:
    UserError: if the set is not there, lacks the split, or was prepared with other labels.
  """
  kinds = {"classification": _labelled, "multilabel": _multilabel, "retrieval": _paired, "choices": _choices}
  return kinds[benchmark.kind](benchmark, data_dir, split)


def _labelled(benchmark: Benchmark, data_dir: str | None, split: str) -> LabelledSet:
  records, names, class_of = _opened(benchmark, data_dir, split)
  label = benchmark.label or int
  labels = np.array([label(records[k][benchmark.label_key]) for k in range(len(records))], np.int64)
  known = (labels >= 0) & (labels < len(class_of))
  known[known] = class_of[labels[known]] >= 0
  if not known.all():
    raise UserError(
      f"split {split!r} of the TFDS set {benchmark.tfds!r} has {np.sum(~known)} of {len(labels)} records without one "
      f"of the {len(names)} classes of {benchmark.name!r}: name another split"
    )
  images = tfds.Images(records, benchmark.image_key, benchmark.pixel_scale)
  templates, source = benchmarks.templates(benchmark)
  return LabelledSet(benchmark.name, images, class_of[labels], names, templates, templates_source=source)


def _multilabel(benchmark: Benchmark, data_dir: str | None, split: str) -> MultiLabelSet:
  records, names, class_of = _opened(benchmark, data_dir, split)
  labels = np.zeros((len(records), len(names)), bool)
  for k in range(len(records)):
    labels[k, class_of[np.asarray(records[k][benchmark.label_key], int)]] = True
  images = tfds.Images(records, benchmark.image_key, benchmark.pixel_scale)
  templates, source = benchmarks.templates(benchmark)
  return MultiLabelSet(benchmark.name, images, labels, names, templates, templates_source=source)


def _paired(benchmark: Benchmark, data_dir: str | None, split: str) -> PairSet:
  if not benchmark.tfds:
    return picture_folders.karpathy(_folder(benchmark.name, data_dir), split)
  keys = {"image_key": benchmark.image_key, "caption_key": benchmark.label_key}
  return tfds.paired(benchmark.tfds, data_dir, split, **keys)


def _choices(benchmark: Benchmark, data_dir: str | None, split: str) -> ChoiceSet:
  if split != benchmark.split:
    raise UserError(f"{benchmark.name!r} has no split {split!r}, it has {benchmark.split}")
  name, _, subset = benchmark.name.partition("/")
  folder = _folder(name, data_dir)
  return picture_folders.sugarcrepe(folder, subset) if subset else picture_folders.winoground(folder)


def _folder(name: str, data_dir: str | None) -> pathlib.Path:
  return paths.typed("data_dir", data_dir or tfds.default_data_dir()) / name


def _opened(benchmark: Benchmark, data_dir: str | None, split: str) -> tuple[tfds.Records, list[str], np.ndarray]:
  """The records, the class names, and the class of each label."""
  records = tfds.Records(benchmark.tfds, data_dir, split)
  records.require(benchmark.image_key, benchmark.label_key)
  labels = records.label_names(benchmark.label_key) if benchmark.label is None else None
  return records, *benchmarks.name_classes(benchmark, labels)
