"""What the report says of the stages of a run."""

import numpy as np
import pytest

from contrastive_jax.evaluation.curves import LEFT, RIGHT, WIDTH, chart
from contrastive_jax.evaluation.report import flat, write_report
from contrastive_jax.evaluation.results import Result, result_path, write_result
from contrastive_jax.evaluation.stages import StageScores, stage_scores

STAGES = [("fixed", 0), ("native", 100), ("clips & images", 160)]


@pytest.fixture
def run(tmp_path):
  def write(dataset, step, **metrics):
    task = "zeroshot_classification" if "acc1" in metrics else "zeroshot_retrieval"
    result = Result(dataset=dataset, task=task, metrics=metrics, language="en", sizes={})
    write_result(result_path(tmp_path, dataset, step), result, model="m", pretrained="p")

  for step in (100, 200):
    write("emoji", step, acc1=step / 1000, acc5=0.9)
  recalls = {f"{way}_retrieval_recall@{k}": k / 100 for way in ("image", "text") for k in (1, 5, 10)}
  write("tfds/strips", 200, **recalls)
  write("emoji", 150, acc1=0.5)  # Not the end of a stage.
  write("emoji", 1200, acc1=0.5)
  return tmp_path


def test_scores_of_the_ends_of_stages_are_found(run):
  first, last = stage_scores(run, STAGES, 200)
  assert (first.name, first.step, first.scores) == ("fixed", 100, {"emoji": 0.1})
  assert (last.name, last.step, last.scores) == ("clips & images", 200, {"emoji": 0.2, "tfds/strips": 0.1})
  assert stage_scores(run / "nowhere", STAGES, 200) == []


def test_the_report_has_a_table_and_marks(run):
  rows = [{"step": step, "loss": 1 / step} for step in range(10, 201, 10)]
  path = write_report(
    run / "report.html",
    title="run",
    config={"curriculum": [{"name": "fixed", "steps": 100}, {"name": "native", "lengths": (64, 128)}]},
    metrics=rows,
    evaluations=[],
    attribution="",
    stages=STAGES,
    by_stage=stage_scores(run, STAGES, 200),
  )
  page = path.read_text()
  assert page.count('<line class="stage"') == 2  # Of three stages in one chart.
  assert "native at 100, clips &amp; images at 160." in page
  assert "Stage by stage" in page and page.count('<th scope="row" dir="auto">') == 2
  assert "clips &amp; images" in page and "<td>10.0%</td>" in page and "<td>–</td>" in page
  assert "curriculum.1.lengths" in page
  alone = write_report(run / "r.html", title="run", config={}, metrics=rows, evaluations=[], attribution="")
  assert "stage" not in alone.read_text().partition("</style>")[2]


def test_marks_are_where_the_steps_are():
  points = [(float(step), step / 200) for step in range(0, 201, 10)]
  drawn = chart("Loss", {"loss": points}, last_step=200.0, stages=[(name, float(step)) for name, step in STAGES])
  places = dict(zip([step for step, _ in points], drawn.lines[0].points.split(), strict=True))
  for (name, step), mark in zip(STAGES, drawn.stages, strict=True):
    assert mark.name == name and mark.x == pytest.approx(float(places[step].split(",")[0]), abs=0.06)
  assert [mark.fits for mark in drawn.stages] == [True, True, False]  # 83 units for 14 letters.
  assert drawn.stages[0].x == LEFT and drawn.stages[-1].x < WIDTH - RIGHT
  crowded = chart("Loss", {"loss": points}, last_step=200.0, stages=[("a long name for a stage", 190.0)])
  assert not crowded.stages[0].fits


def test_lists_of_stages_are_spelt_out_in_the_configuration():
  rows = dict(flat({"a": [{"b": 1}, {"b": {"c": (2, 3)}}], "d": (), "e": (1, 2)}))
  assert rows == {"a.0.b": "1", "a.1.b.c": "(2, 3)", "d": "()", "e": "(1, 2)"}


def test_one_stage_is_no_table(tmp_path):
  path = write_report(
    tmp_path / "r.html",
    title="run",
    config={},
    metrics=[{"step": s, "loss": 1.0} for s in (1, 2)],
    evaluations=[],
    attribution="",
    stages=[("all", 0)],
    by_stage=[StageScores("all", 2, {"emoji": np.float64(0.5)})],
  )
  assert "Stage by stage" not in path.read_text() and '<line class="stage"' not in path.read_text()
