"""Fills the figures of `make train` in README.md and docs/ from the files of its runs, and checks that they agree.

python -m benchmarks.figures --runs=runs/emoji,runs/seed1,runs/seed2   # one run a seed: fills the figures
python -m benchmarks.figures --check   # compares the pages with docs/figures.json

A figure stands between `<!-- figure: NAME -->` and `<!-- / -->`. docs/figures.json holds their values and the runs that
they come from.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags

from contrastive_jax import sessions
from contrastive_jax.evaluation.results import percent, read_result, result_path
from contrastive_jax.runs import read_config

ROOT = Path(__file__).parents[1]
# What each figure is: the evaluation set, and the metric in its file.
METRICS = {
  "openmoji_top1": ("emoji_openmoji", "acc1"),
  "openmoji_top5": ("emoji_openmoji", "acc5"),
  "openmoji_top1_of_100": ("emoji_openmoji", "acc1_of_100"),
  "heldout_recall1": ("emoji_heldout", "image_retrieval_recall@1"),
  "heldout_recall10": ("emoji_heldout", "image_retrieval_recall@10"),
}
MARK = re.compile(r"(<!-- figure: (\S+) -->)(.*?)(<!-- / -->)", re.DOTALL)

RUNS = flags.DEFINE_list("runs", [], "Finished runs of configs/emoji.py, one for each seed.")
CHECK = flags.DEFINE_bool("check", False, "Changes nothing; fails where a page and docs/figures.json differ.")


def pages(root: Path = ROOT) -> list[Path]:
  """Returns the pages that may hold figures."""
  return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def figures_of(runs: Sequence[Path]) -> dict[str, str]:
  """Returns the figures of some runs as text, by name: "openmoji_top1_seed0" and so on, and "minutes_seed0".

  Args:
    runs: run directories that `train.py` has finished, each of another seed.

  Raises:
    ValueError: for a run of another config, a run that is not finished, or two runs of one seed.
  """
  found: dict[str, str] = {}
  for run in runs:
    config = read_config(run)
    seed = config["seed"]
    if config["name"] != "emoji" or config["loss"] != "softmax":
      raise ValueError(f"{run} is a run of {config['name']} with the loss {config['loss']}, not of configs/emoji.py")
    if f"openmoji_top1_seed{seed}" in found:
      raise ValueError(f"{run} has the seed {seed} of a run before it")
    for name, (dataset, metric) in METRICS.items():
      path = result_path(run, dataset, config["total_steps"])
      if not path.is_file():
        raise ValueError(f"{run} is not finished: it has no {path.relative_to(run)}")
      found[f"{name}_seed{seed}"] = percent(read_result(path)["metrics"][metric])
    worked = sessions.read(run)
    if worked:
      found[f"minutes_seed{seed}"] = f"{sum(session['seconds'] for session in worked) / 60:.1f}"
  return found


def differing(text: str, figures: Mapping[str, str]) -> list[str]:
  """Sentences on the marked figures of a page that are not those given; empty where all agree."""
  return [
    f"{name} is {shown.strip()!r}, and {figures.get(name, 'no figure')!r} in docs/figures.json"
    for _, name, shown, _ in MARK.findall(text)
    if figures.get(name) != shown.strip()
  ]


def filled(text: str, figures: Mapping[str, str]) -> str:
  """Returns the page with its marked figures replaced.

  Raises:
    KeyError: for a mark whose figure the runs do not give.
  """
  return MARK.sub(lambda mark: f"{mark[1]}{figures[mark[2]]}{mark[4]}", text)


def main(_: Sequence[str]) -> None:
  store = ROOT / "docs" / "figures.json"
  if CHECK.value == bool(RUNS.value):
    sys.exit("give either --check or --runs=runs/emoji,...")
  if CHECK.value:
    if not store.exists():
      sys.exit("docs/figures.json is missing: make it with --runs=runs/emoji,runs/seed1,runs/seed2")
    figures = json.loads(store.read_text(encoding="utf-8"))["figures"]
    wrong = [f"{page.name}: {each}" for page in pages() for each in differing(page.read_text("utf-8"), figures)]
    sys.exit("\n".join(wrong) if wrong else 0)
  runs = [Path(run) for run in RUNS.value]
  figures = figures_of(runs)
  written = {page: filled(page.read_text(encoding="utf-8"), figures) for page in pages()}
  for page, text in written.items():
    page.write_text(text, encoding="utf-8")
  record = {"runs": {str(run): sessions.facts(sessions.read(run)) for run in runs}, "figures": figures}
  store.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
  for name, value in figures.items():
    print(f"{name}: {value}")


if __name__ == "__main__":
  app.run(main)
