"""Evaluation sets by name."""

from contrastive_jax.errors import require_known
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from data.emoji_evaluation import EVALUATIONS
from data.sources import tfds


def check(name: str) -> None:
  """Raises a `UserError` for a name that is no task, without reading any data."""
  if not name.startswith("tfds/"):
    require_known("task", name, (*EVALUATIONS, "tfds/<set>"))


def load(name: str, data_dir: str = "") -> LabelledSet | PairSet:
  """Opens an evaluation set: one of `EVALUATIONS`, or "tfds/<set>" with an optional ":<split>".

  Raises:
    UserError: for an unknown name, or data that is not on this machine.
  """
  check(name)
  if name.startswith("tfds/"):
    dataset, _, split = name.removeprefix("tfds/").partition(":")
    return tfds.labelled(dataset, data_dir or None, split or "test")
  return EVALUATIONS[name]()
