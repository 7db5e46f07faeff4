import json

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import compare
from tests import runs
from tests.evaluation.test_report import Page

ATTACK = "<script>alert('x')</script>"


def write_run(path, *, scores=(), rows=(), **config):
  (path / "eval").mkdir(parents=True)
  (path / "config.json").write_text(json.dumps({"name": "toy", "model": {"depth": 2}, **config}))
  for dataset, task, step, metrics in scores:
    probe = "" if task.startswith("zeroshot") else f".{task}"
    file = path / "eval" / f"{dataset.replace('/', '_')}@{step}{probe}.json"
    file.write_text(json.dumps({"dataset": dataset, "task": task, "metrics": metrics}))
  (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def three(tmp_path):
  """Two runs that share a set, scored at other steps, and one that was never scored."""
  classes, pairs = "zeroshot_classification", "zeroshot_retrieval"
  one = write_run(
    tmp_path / "one",
    scores=[
      ("tfds/toy", classes, 9, {"acc1": 0.9}),
      ("tfds/toy", classes, 100, {"acc1": 0.5, "acc5": 0.75}),
      ("tfds/toy", "linear_probe", 9, {"lp_acc1": 0.9}),
      ("tfds/toy", "linear_probe", 100, {"lp_acc1": 0.8}),
      ("pairs", pairs, 100, {"image_retrieval_recall@1": 0.2, "image_retrieval_recall@5": 0.4, "alignment": 1.25}),
    ],
    rows=[{"step": s, "loss": 10 / s, "tfds/toy/acc1": s / 200, "pairs/alignment": 1.0} for s in (1, 50, 100)],
    seed=0,
  )
  two = write_run(
    tmp_path / "two",
    scores=[
      ("tfds/toy", classes, 80, {"acc1": 0.625, "acc5": 0.7}),
      ("pairs", pairs, 80, {"image_retrieval_recall@1": 0.1, "image_retrieval_recall@5": 0.4, "alignment": 1.5}),
    ],
    rows=[{"step": s, "loss": 20 / s, "tfds/toy/acc1": s / 100} for s in (1, 40, 80)],
    seed=1,
    loss=ATTACK,
  )
  return [one, two, write_run(tmp_path / "three", seed=0)]


def test_each_task_is_a_row_measured_against_the_first_run(three):
  runs_read = compare.read_runs(three)
  assert [run.name for run in runs_read] == ["one", "two", "three"]
  found = {(row.dataset, row.task, row.metric): row for row in compare.table(runs_read)}
  accuracy = found["tfds/toy", "zeroshot_classification", "acc1"]
  assert accuracy.main and accuracy.cells == (
    compare.Cell("50.0%", "", None, False, 100),
    compare.Cell("62.5%", "+12.5", True, True, 80),
    None,
  )
  top5 = found["tfds/toy", "zeroshot_classification", "acc5"]
  assert [(cell.difference, cell.better, cell.best) for cell in top5.cells[:2]] == [
    ("", None, True),
    ("-5.0", False, False),
  ]
  # Recall at the largest cut-off comes first; equal runs are both best.
  recall = found["pairs", "zeroshot_retrieval", "image_retrieval_recall@5"]
  assert recall.main and [cell.best for cell in recall.cells[:2]] == [True, True]
  assert recall.cells[1].difference == "+0.0" and recall.cells[1].better is None
  # No share of anything: neither is better.
  alignment = found["pairs", "zeroshot_retrieval", "alignment"].cells[1]
  assert alignment == compare.Cell("1.5", "+0.25", None, False, 80)
  # Scored in one run only: there is nothing to be better than.
  alone = found["tfds/toy", "linear_probe", "lp_acc1"].cells
  assert alone == (compare.Cell("80.0%", "", None, False, 100), None, None)


def test_curves_of_the_runs_share_their_axes(three):
  drawn = {chart.title: chart for chart in compare.overlaid(compare.read_runs(three))}
  assert list(drawn) == ["Loss", "tfds/toy: Top-1 accuracy"]
  for chart in drawn.values():
    assert [line.name for line in chart.lines] == ["one", "two"]
    # The second run stopped at 80 of 100 steps.
    ends = [line.ends[0] for line in chart.lines]
    assert (ends[1] - 50) / (ends[0] - 50) == pytest.approx(0.8, abs=0.01)


def test_the_page_shows_scores_curves_and_what_differs(three, tmp_path):
  path = compare.write_comparison(tmp_path / "comparison.html", compare.read_runs(three))
  text = path.read_text(encoding="utf-8")
  page = Page(text)
  assert "script" not in page.tags and page.tags.count("svg") == 2
  words = " ".join(" ".join(page.text).split())
  for expected in ("62.5%", "+12.5", "linear probe", "Recall@5, caption to image", "seed", ATTACK, "step 80"):
    assert expected in words, expected
  assert "model.depth" not in words
  # One of two runs for both accuracies and recall@1, both for recall@5.
  assert text.count('<td class="best">') == 5


def test_runs_without_scores_or_rows_have_a_page(tmp_path):
  paths = [write_run(tmp_path / name) for name in ("a", "b")]
  page = Page(compare.write_comparison(tmp_path / "c.html", compare.read_runs(paths)).read_text(encoding="utf-8"))
  assert "svg" not in page.tags
  assert any("None of the runs was scored" in text for text in page.text)


def test_what_is_no_run_or_named_twice_is_refused(three, tmp_path):
  with pytest.raises(UserError, match="nowhere is not a run directory"):
    compare.read_runs([three[0], tmp_path / "nowhere"])
  for given in ([three[0]], [three[0], three[0]], []):
    with pytest.raises(UserError, match="two different runs"):
      compare.read_runs(given)


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
  paths = [write_run(tmp_path / name / "emoji") for name in ("a", "b")]
  assert [run.name for run in compare.read_runs(paths)] == [str(path) for path in paths]


@pytest.mark.slow
def test_the_command_takes_directories_behind_the_flag(three, tmp_path):
  printed = runs.run("eval.py", "--compare", *map(str, three[:2]))
  lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
  assert lines["task"] == ["metric", "one", "two"]
  assert lines["pairs"] == ["image_retrieval_recall@5", "40.0%", "40.0%", "(+0.0)"]
  assert (tmp_path / "comparison.html").is_file()
  runs.run("eval.py", f"--compare={three[0]},{three[1]}", f"--output={tmp_path / 'other.html'}")
  assert (tmp_path / "other.html").is_file()
  for flag in ("--workdir=runs/emoji", "--probe_shots=5"):
    refused = runs.run("eval.py", "--compare", *map(str, three[:2]), flag, expected=2)
    assert f"{flag.partition('=')[0]} is for scoring, and --compare scores nothing" in refused
  assert "two different runs" in runs.run("eval.py", "--compare", str(three[0]), expected=2)
