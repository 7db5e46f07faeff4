"""Evaluation sets by name."""

from contrastive_jax.errors import require_known
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from data import emoji_evaluation, motion, strips
from data.sources import tfds

EVALUATIONS = emoji_evaluation.EVALUATIONS | motion.EVALUATIONS | strips.EVALUATIONS


def check(name: str) -> None:
  """Raises a `UserError` for a name that is no task, without reading any data."""
  if not name.startswith("tfds/"):
    require_known("task", name, (*EVALUATIONS, "tfds/<set>"))


def load(name: str, data_dir: str = "") -> LabelledSet | PairSet:
  """Opens an evaluation set: one of `EVALUATIONS`, or "tfds/<set>" with an optional "@<split>".

  A TFDS set with labels is for zero-shot classification, one with captions for retrieval.

  Raises:
    UserError: for an unknown name, or data that is not on this machine.
  """
  check(name)
  if name.startswith("tfds/"):
    dataset, _, split = name.removeprefix("tfds/").partition("@")
    where = (dataset, data_dir or None, split or "test")
    read = tfds.labelled if "label" in tfds.Records(*where, "image").features else tfds.paired
    return read(*where)
  return EVALUATIONS[name]()
