"""What objectives are worth on emoji: the run of configs/emoji.py with each, at equal images, in one table and a plot.

  python -m benchmarks.objectives             # all of them, a quarter of the config's steps; runs/objectives
  python -m benchmarks.objectives --objectives=softmax,dcl --seeds=0
  python -m benchmarks.objectives --steps=1000 --seeds=0,1,2 --write

Runs that are complete are not repeated, and what was interrupted goes on. The table is printed after every run, and
--write puts it and the plot into docs/. Losses that --objectives does not name are left out of the table.

OpenMoji is a style that no run has seen; the other columns are of held-out concepts in the styles that it has. Times
are relative to those of softmax, and mean something where nothing else ran.

The file is also the config of these runs: --config=benchmarks/objectives.py:dcl.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import short_runs
from configs import emoji

ROOT = Path(__file__).parents[1]
BASE = "softmax"
# Each: the weights of its terms, and options of terms beside those of configs/emoji.py.
OBJECTIVES: Mapping[str, tuple[Mapping[str, float], Mapping[str, Mapping[str, Any]]]] = {
  "softmax": ({"softmax": 1.0}, {}),
  "sigmoid": ({"sigmoid": 1.0}, {}),
  "mean_negatives": ({"softmax": 1.0}, {"softmax": {"mean_negatives": True, "label_smoothing": 0.0}}),
  "hard_top_32": ({"softmax": 1.0}, {"softmax": {"hard_top_k": 32, "label_smoothing": 0.0}}),
  "clusters": ({"softmax": 1.0}, {"softmax": {"clusters": (32, 96), "label_smoothing": 0.0}}),
  "dcl": ({"dcl": 1.0}, {"dcl": {"temperature": 0.05}}),
  "cwcl": ({"cwcl": 1.0}, {}),
  "mann_whitney": ({"mann_whitney": 1.0}, {}),
  "mv_infonce": ({"mv_infonce": 1.0}, {}),
  "mochi": ({"mochi": 1.0}, {}),
  "groco": ({"groco": 1.0}, {"groco": {"steepness": 20.0}}),
  "cacr": ({"cacr": 1.0}, {}),
  "individual_temperatures": ({"individual_temperatures": 1.0}, {"individual_temperatures": {"temperature": 0.05}}),
  "sogclr": ({"sogclr": 1.0}, {"sogclr": {"temperature": 0.05}}),
  "queued_softmax": ({"queued_softmax": 1.0}, {"queued_softmax": {"size": 2048}}),
  "matryoshka": ({"matryoshka": 1.0}, {"matryoshka": {"of": "softmax"}}),
  "fixed_head": ({"fixed_head": 1.0}, {"fixed_head": {"of": "softmax"}}),
  "softmax+multi_head": ({"softmax": 1.0, "multi_head": 0.3}, {"multi_head": {"of": "softmax"}}),
  "softmax+pamc": ({"softmax": 1.0, "pamc": 0.3}, {"pamc": {"clusters": 32}}),
  "softmax+simlap": ({"softmax": 1.0, "simlap": 0.1}, {}),
  "softmax+margin_regularizer": ({"softmax": 1.0, "margin_regularizer": 0.1}, {}),
  "softmax+mixup": ({"softmax": 1.0, "mixup": 0.3}, {}),
  "softmax+soft_clip": ({"softmax": 1.0, "soft_clip": 0.3}, {}),
  "softmax+mv_dhel": ({"softmax": 1.0, "mv_dhel": 0.3}, {}),
  "softmax+uniformity+alignment": ({"softmax": 1.0, "uniformity": 0.3, "alignment": 0.3}, {}),
  "softmax+swapped_prototypes": (
    {"softmax": 1.0, "swapped_prototypes": 0.2},
    {"swapped_prototypes": {"prototypes": 256}},
  ),
  "softmax+barlip": ({"softmax": 1.0, "barlip": 0.025}, {}),
  "softmax+siamlip": ({"softmax": 1.0, "siamlip": 0.3}, {}),
}
# (column, evaluation set, metric, factor)
COLUMNS = (
  ("OpenMoji top-1", "emoji_openmoji", "acc1", 100),
  ("held out, recall@1", "emoji_heldout", "image_retrieval_recall@1", 100),
  ("recall@10", "emoji_heldout", "image_retrieval_recall@10", 100),
  ("uniformity", "emoji_heldout", "uniformity_cross", 1),
  ("alignment", "emoji_heldout", "alignment", 1),
  ("gap", "emoji_heldout", "modality_gap", 1),
)


def get_config(name: str) -> ConfigDict:
  """Returns the config of one objective."""
  weights, options = OBJECTIVES[name]
  config = emoji.get_config()
  config.name = f"emoji_{name}"
  config.objective = ConfigDict(dict(weights))
  for term, values in options.items():
    config.loss_options[term].update(values)
  config.evals = ()
  config.final_evals = ("emoji_heldout", "emoji_openmoji")
  return config


def train(root: Path, name: str, seed: int, steps: int) -> Path:
  """Trains with an objective, unless that is done, and returns the run directory."""
  workdir = root / f"{name}-{steps}-{seed}"
  options = (f"--config.seed={seed}", f"--config.total_steps={steps}", f"--config.checkpoint_every={steps}")
  short_runs.train(f"benchmarks/objectives.py:{name}", workdir, *options)
  return workdir


def numbers_of(workdir: Path) -> list[float]:
  """Returns the numbers of the columns, and the seconds of a step."""
  found = [factor * short_runs.score(workdir, dataset, metric) for _, dataset, metric, factor in COLUMNS]
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  # The first rows hold the compilation.
  return [*found, statistics.median(row["step_seconds"] for row in rows[2:] if "step_seconds" in row)]


def table(found: Mapping[str, np.ndarray]) -> str:
  """Returns the table in Markdown, the best on OpenMoji first.

  Args:
    found: of each objective the numbers `[seeds, columns]`.
  """
  lines = ["| objective | " + " | ".join(title for title, *_ in COLUMNS) + " | time of a step |"]
  lines.append("|---" * (len(COLUMNS) + 2) + "|")
  for name, numbers in sorted(found.items(), key=lambda each: -each[1][:, 0].mean()):
    *means, seconds = numbers.mean(axis=0)
    cells = [f"{mean:.1f}%" if column[3] == 100 else f"{mean:.2f}" for mean, column in zip(means, COLUMNS, strict=True)]
    if len(numbers) > 1:
      cells[0] += f" ± {numbers[:, 0].std(ddof=1):.1f}"
    cells.append(f"{seconds / found[BASE][:, -1].mean():.2f}" if BASE in found else f"{seconds:.2f} s")
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plot(found: Mapping[str, np.ndarray], path: Path) -> None:
  """Draws top-1 on OpenMoji of every objective, one dot for each seed."""
  from matplotlib import pyplot

  names = sorted(found, key=lambda name: found[name][:, 0].mean())
  figure, axes = pyplot.subplots(figsize=(7, 1 + 0.28 * len(names)), layout="constrained")
  for row, name in enumerate(names):
    scores = found[name][:, 0]
    axes.plot(scores.mean(), row, "|", markersize=14, color="black")
    axes.plot(
      scores, [row] * len(scores), "o", markersize=4, alpha=0.6, color="tab:red" if name == BASE else "tab:blue"
    )
  if BASE in found:
    axes.axvline(found[BASE][:, 0].mean(), linewidth=0.8, color="tab:red")
  axes.set(yticks=range(len(names)), yticklabels=names, xlabel="top-1 of 1,853 OpenMoji drawings, percent")
  axes.grid(axis="x", alpha=0.3)
  figure.savefig(path)


def main(_) -> None:
  seeds = [int(seed) for seed in _SEEDS.value]
  for name in _OBJECTIVES.value:
    if name not in OBJECTIVES:
      sys.exit(f"--objectives names {name!r}: known are {', '.join(OBJECTIVES)}")
  found: dict[str, np.ndarray] = {}
  for seed in seeds:
    for name in _OBJECTIVES.value:
      numbers = numbers_of(train(Path(_WORKDIR.value), name, seed, _STEPS.value))
      found[name] = np.array([*found.get(name, ()), numbers])
      print(f"\n{_STEPS.value:,} steps, seeds {', '.join(_SEEDS.value)}\n{table(found)}\n", flush=True)
  if _WRITE.value:
    page = ROOT / "docs" / "objectives_on_emoji.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    said = f"{_STEPS.value:,} steps of {emoji.get_config().batch_size} pairs, seeds {', '.join(_SEEDS.value)}."
    page.write_text(f"{before}{_BEGIN}\n{said}\n\n{table(found)}\n{_END}{after}", encoding="utf-8")
    plot(found, ROOT / "docs" / "objectives_on_emoji.svg")


_BEGIN, _END = "<!-- table of benchmarks.objectives -->", "<!-- / -->"

if __name__ == "__main__":
  # Not where this file is read as a config.
  _WORKDIR = flags.DEFINE_string("workdir", "runs/objectives", "Where the runs go.")
  _OBJECTIVES = flags.DEFINE_list("objectives", list(OBJECTIVES), "Which of them to run.")
  _SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of weights, draws and order.")
  _STEPS = flags.DEFINE_integer("steps", emoji.get_config().total_steps // 4, "Steps of each run.", lower_bound=60)
  _WRITE = flags.DEFINE_bool("write", False, "Put the table and the plot into docs/.")
  app.run(main)
