"""Evaluation sets by name."""

import dataclasses
from collections.abc import Iterable

from contrastive_jax.errors import require_known
from contrastive_jax.evaluation.benchmarks import BENCHMARKS
from contrastive_jax.evaluation.tasks import EvaluationSet
from data import benchmarks, emoji_evaluation, motion, strips
from data.emoji import LANGUAGES
from data.sources import tfds

EVALUATIONS = emoji_evaluation.EVALUATIONS | motion.EVALUATIONS | strips.EVALUATIONS
# One name for several sets.
GROUPS = {
  "emoji_openmoji_languages": ("emoji_openmoji", *(f"emoji_openmoji_{language}" for language in LANGUAGES)),
  "sugarcrepe": tuple(name for name in BENCHMARKS if name.startswith("sugarcrepe/")),
}


def expand(names: Iterable[str]) -> list[str]:
  """What `--tasks` or a config names, a group as its members, each set once; reads no data.

  Args:
    names: of sets, with an optional "@<split>", or of `GROUPS`.

  Raises:
    UserError: for a name that is no task.
  """
  single = list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))
  for name in single:
    _check(name)
  return single


def load(name: str, data_dir: str = "") -> EvaluationSet:
  """Opens an evaluation set: one of `EVALUATIONS`; or one of `BENCHMARKS` or "tfds/<set>", with an optional "@<split>".

  A TFDS set with labels is for zero-shot classification, one with captions for retrieval. A benchmark has class names,
  prompts and splits of its own; its "@train" is what a probe may learn from.

  Args:
    name: of one set, as `expand` gives it.
    data_dir: TFDS's directory of sets, which also has the folders of pictures; "" is TFDS's own default.

  Raises:
    UserError: for an unknown name, or data that is not on this machine.
  """
  _check(name)
  if name in EVALUATIONS:
    return EVALUATIONS[name]()
  known, where = name.partition("@")[0], (data_dir or None, split_of(name))
  if known in BENCHMARKS:
    opened = benchmarks.load(BENCHMARKS[known], *where)
  else:
    known = known.removeprefix("tfds/")
    read = tfds.labelled if "label" in tfds.Records(known, *where).features else tfds.paired
    opened = read(known, *where)
  # Results are filed under this name, and those of another split must not replace them.
  return dataclasses.replace(opened, name=name)


def split_of(name: str) -> str:
  """The split that a benchmark or "tfds/<set>" opens, in TFDS's notation."""
  known, _, split = name.partition("@")
  if known not in BENCHMARKS:
    return split or "test"
  return {"": BENCHMARKS[known].split, "train": BENCHMARKS[known].train}.get(split, split)


def _check(name: str) -> None:
  if not name.startswith("tfds/") and name.partition("@")[0] not in BENCHMARKS:
    require_known("task", name, (*EVALUATIONS, *GROUPS, *BENCHMARKS, "tfds/<set>"))
