"""The scores of a model at the end of each stage of its training, from the results that lie in the run."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from contrastive_jax.evaluation.results import main_metric, read_results


@dataclasses.dataclass(frozen=True)
class StageScores:
  """The scores at the end of a stage.

  Attributes:
    name: name of the stage.
    step: number of updates done by then.
    scores: the main metric of each evaluation set, by the set's name.
  """

  name: str
  step: int
  scores: Mapping[str, float]


def stage_scores(workdir: str | os.PathLike, stages: Sequence[tuple[str, int]], last_step: int) -> list[StageScores]:
  """Reads `<workdir>/eval/<set>@<step>.json` of the steps at which stages end.

  Args:
    workdir: the run directory.
    stages: (name, first step) of each stage, in order; a stage ends where the next one begins.
    last_step: the step at which the last stage ends.

  Returns:
    The stages that were evaluated at their end.
  """
  ends = [*(first for _, first in stages[1:]), last_step]
  found = []
  for (name, _), step in zip(stages, ends, strict=True):
    scores = {}
    for _, result in read_results(sorted((Path(workdir) / "eval").glob(f"*@{step}.json"))):
      scores[result["dataset"]] = result["metrics"][main_metric(result["metrics"])]
    if scores:
      found.append(StageScores(name, step, scores))
  return found
