"""The evaluation sets that have names, as `eval.py --tasks=list` shows them."""

import dataclasses

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, class_count
from contrastive_jax.evaluation.tasks import ChoiceSet, EvaluationSet, LabelledSet, MultiLabelSet, kind_of
from data.sources.formats import FORMATS
from data.tasks import EVALUATIONS, GROUPS

_KINDS = {
  "classification": "zero-shot classification",
  "multilabel": "zero-shot classification, several classes an image",
  "retrieval": "retrieval",
  "choices": "hard pairs",
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the list.

  Attributes:
    name: name of the set, or of the group of sets, for `--tasks`.
    kind: the kind of measurement.
    size: contents of the set, as far as this machine knows without the data.
    data: origin of the data.
  """

  name: str
  kind: str
  size: str
  data: str


def rows() -> list[Row]:
  """Lists every named set, then the groups of sets, then whatever else `--tasks` takes."""
  own = [_own(name) for name in EVALUATIONS]
  known = [_benchmark(benchmark) for benchmark in BENCHMARKS.values()]
  groups = [Row(name, "group", f"{len(members)} sets", _shortened(members)) for name, members in GROUPS.items()]
  kind = "classification or retrieval"
  others = [
    Row("tfds/<set>[@<split>]", kind, "", "any TFDS set prepared in --data_dir"),
    Row("table/<file>[@<split>]", "retrieval", "", "pictures and captions that a table names"),
    Row("folder/<folder>[@<split>]", kind, "", "pictures with captions beside them, or a folder for each class"),
    *(Row(f"{kind}/<files>[@<split>]", "retrieval", "", "shards with an index of data.index") for kind in FORMATS),
  ]
  return [*own, *known, *groups, *others]


def _own(name: str) -> Row:
  """Describes a set of this project, whose pictures come with the packages of requirements.txt."""
  try:
    opened = EVALUATIONS[name]()
  except UserError as error:
    return Row(name, "", "", f"not available: {error}")
  return Row(name, *_measured(opened), "drawings from the packages of requirements.txt")


def _measured(opened: EvaluationSet) -> tuple[str, str]:
  """Returns the kind and the size of a set that is open."""
  images = f"{len(opened.images):,} {kind_of(opened.images)}"
  if isinstance(opened, LabelledSet | MultiLabelSet):
    kind = "classification" if isinstance(opened, LabelledSet) else "multilabel"
    return _KINDS[kind], f"{images}, {len(opened.classes):,} classes"
  if isinstance(opened, ChoiceSet):
    return _KINDS["choices"], f"{images}, {len(opened.captions):,} instances"
  return _KINDS["retrieval"], f"{images}, {len(opened.captions):,} captions"


def _benchmark(benchmark: Benchmark) -> Row:
  classes = class_count(benchmark)
  size = f"{classes:,} classes" if classes else ""
  origin = f"TFDS {benchmark.tfds}" if benchmark.tfds else f"folder {benchmark.name.partition('/')[0]} in --data_dir"
  return Row(benchmark.name, _KINDS[benchmark.kind], size, f"{origin}, split {benchmark.split}")


def _shortened(members: tuple[str, ...]) -> str:
  return ", ".join(members[:2]) + (", ..." if len(members) > 2 else "")
