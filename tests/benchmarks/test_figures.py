"""Figures of docs come from files of runs, and pages that say something else are found."""

import json

import pytest

from benchmarks import figures

PAGE = "".join(
  f"<!-- figure: {name}_seed0 -->{value}<!-- / --> and " for name, value in (("x", "1%"), ("y", "2%"), ("x", "1%"))
)


def run(path, seed=0, name="emoji", loss="softmax", steps=10, top1=0.234):
  (path / "eval").mkdir(parents=True)
  config = {"name": name, "seed": seed, "loss": loss, "total_steps": steps}
  (path / "config.json").write_text(json.dumps(config))
  for dataset, metrics in {
    "emoji_openmoji": {"acc1": top1, "acc5": 0.425, "acc1_of_100": 0.51},
    "emoji_heldout": {"image_retrieval_recall@1": 1 / 3, "image_retrieval_recall@10": 0.543},
  }.items():
    result = {"dataset": dataset, "task": "any", "metrics": metrics}
    (path / "eval" / f"{dataset}@{steps}.json").write_text(json.dumps(result))
  return path


def test_figures_are_those_of_the_files(tmp_path):
  found = figures.figures_of([run(tmp_path / "a"), run(tmp_path / "b", seed=1, top1=0.0052)])
  assert found["openmoji_top1_seed0"] == "23.4%" and found["openmoji_top1_seed1"] == "0.52%"
  assert found["heldout_recall1_seed0"] == "33.3%" and found["openmoji_top1_of_100_seed1"] == "51.0%"


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"name": "emoji_clip"}, "not of configs/emoji.py"),
    ({"loss": "sigmoid"}, "not of configs/emoji.py"),
    ({"seed": 0}, "has the seed 0 of a run before it"),
  ],
)
def test_runs_that_the_figures_cannot_come_from(change, sentence, tmp_path):
  with pytest.raises(ValueError, match=sentence):
    figures.figures_of([run(tmp_path / "a"), run(tmp_path / "b", **change)])


def test_an_unfinished_run_is_refused(tmp_path):
  path = run(tmp_path / "a")
  (path / "eval" / "emoji_heldout@10.json").unlink()
  with pytest.raises(ValueError, match="not finished: it has no eval/emoji_heldout@10"):
    figures.figures_of([path])


def test_a_filled_page_agrees_and_any_other_does_not():
  known = {"x_seed0": "5%", "y_seed0": "6%"}
  assert len(figures.differing(PAGE, known)) == 3
  page = figures.filled(PAGE, known)
  assert page.count("5%") == 2 and figures.differing(page, known) == []
  assert figures.differing(page, {"x_seed0": "5%"}) == ["y_seed0 is '6%', and 'no figure' in docs/figures.json"]
  with pytest.raises(KeyError):
    figures.filled(PAGE, {"x_seed0": "5%"})


def test_every_mark_names_a_figure_that_a_run_gives():
  for page in figures.pages():
    for _, name, _, _ in figures.MARK.findall(page.read_text(encoding="utf-8")):
      assert name.rpartition("_seed")[0] in (*figures.METRICS, "minutes"), f"{page.name}: {name}"


def test_one_figure_has_one_value_in_all_pages():
  seen = {}
  for page in figures.pages():
    for _, name, shown, _ in figures.MARK.findall(page.read_text(encoding="utf-8")):
      assert seen.setdefault(name, shown.strip()) == shown.strip(), f"{page.name}: {name}"
  assert seen


def test_pages_agree_with_the_recorded_figures():
  store = figures.ROOT / "docs" / "figures.json"
  if not store.exists():
    pytest.skip("docs/figures.json is made by `python -m benchmarks.figures --runs=...`")
  known = json.loads(store.read_text(encoding="utf-8"))["figures"]
  for page in figures.pages():
    assert figures.differing(page.read_text(encoding="utf-8"), known) == [], page.name
