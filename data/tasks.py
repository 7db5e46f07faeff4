"""Evaluation sets by name."""

from contrastive_jax.errors import require_known
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from data import emoji_evaluation
from data.sources import tfds

EMOJI_TASKS = {
  "emoji_openmoji": emoji_evaluation.openmoji,
  "emoji_noto": emoji_evaluation.noto,
  "emoji_twemoji": emoji_evaluation.twemoji,
  "emoji_heldout": emoji_evaluation.heldout,
}


def check(name: str) -> None:
  """Raises a `UserError` for a name that is no task, without reading any data."""
  if not name.startswith("tfds/"):
    require_known("task", name, (*EMOJI_TASKS, "tfds/<set>"))


def load(name: str, data_dir: str = "") -> LabelledSet | PairSet:
  """Opens an evaluation set: one of `EMOJI_TASKS`, or "tfds/<set>" with an optional ":<split>".

  Raises:
    UserError: for an unknown name, or data that is not on this machine.
  """
  check(name)
  if name.startswith("tfds/"):
    dataset, _, split = name.removeprefix("tfds/").partition(":")
    return tfds.labelled(dataset, data_dir or None, split or "test")
  return EMOJI_TASKS[name]()
