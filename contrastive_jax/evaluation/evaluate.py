"""Scores a model on several sets and writes what they give."""

from collections.abc import Iterable
from pathlib import Path

import jax

from contrastive_jax.evaluation.results import Result, result_path, write_result
from contrastive_jax.evaluation.retrieval import evaluate_retrieval
from contrastive_jax.evaluation.tasks import Encoder, LabelledSet, PairSet
from contrastive_jax.evaluation.zero_shot import evaluate_zero_shot


def evaluate(
  model: Encoder, sets: Iterable[LabelledSet | PairSet], *, workdir: Path, step: int, architecture: str
) -> list[Result]:
  """Zero-shot classification of labelled sets and retrieval of pair sets.

  Every process calls it; the main one writes `<workdir>/eval/<set>@<step>.json`.

  Args:
    model: embeds images and texts.
    sets: what to score.
    workdir: of the run, and what its results call their weights.
    step: of the checkpoint.
    architecture: what the results call the model.
  """
  results = []
  for scored in sets:
    result = (evaluate_zero_shot if isinstance(scored, LabelledSet) else evaluate_retrieval)(model, scored)
    results.append(result)
    if jax.process_index() == 0:
      path = result_path(workdir, result.dataset, step)
      write_result(path, result, model=architecture, pretrained=f"{workdir}@{step}")
  return results


def scalars(results: Iterable[Result]) -> dict[str, float]:
  """The metrics of all results as one row: {"emoji_openmoji/acc1": 0.1}."""
  return {f"{result.dataset}/{name}": value for result in results for name, value in result.metrics.items()}
