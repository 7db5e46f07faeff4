"""Several runs side by side: what each scored on every task, and their curves in one frame."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import curves
from contrastive_jax.evaluation.report import flat, metric_name, render, speed_series
from contrastive_jax.evaluation.results import PLAIN_METRICS, figure, main_metric, read_results, scored_sets
from contrastive_jax.runs import read_config, read_json_lines, write_atomically

# (data set, task): a set may have been scored zero-shot and by a probe.
Task = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, as it lies in its directory.

  Attributes:
    name: a name that tells it from the others.
    config: the resolved config, nested.
    scores: the metrics of each task at the newest step at which it was scored.
    steps: the newest step of each task.
    rows: the rows of `metrics.jsonl`.
  """

  name: str
  config: Mapping[str, Any]
  scores: Mapping[Task, Mapping[str, float]]
  steps: Mapping[Task, int]
  rows: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run's value of a metric.

  Attributes:
    text: the value.
    difference: difference to the first run, in percentage points where the metric is a share; empty for the first run.
    better: whether it is above the first run, None where neither is better.
    best: whether no run has more.
    step: the step at which the run was scored.
  """

  text: str
  difference: str
  better: bool | None
  best: bool
  step: int


@dataclasses.dataclass(frozen=True)
class Row:
  """One metric of a task: a cell for each run, None where the run was not scored.

  Attributes:
    dataset: name of the set.
    task: name of the task.
    metric: name of the metric in CLIP_benchmark.
    main: whether it is the metric people ask for first.
    cells: in the order of the runs.
  """

  dataset: str
  task: str
  metric: str
  main: bool
  cells: tuple[Cell | None, ...]


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
  """Opens run directories.

  Raises:
    UserError: if one is none, is named twice, or if there are fewer than two.
  """
  paths = [Path(workdir).resolve() for workdir in workdirs]
  if len(set(paths)) < max(len(paths), 2):
    given = ",".join(map(str, workdirs))
    raise UserError(f"--compare={given}: name two different runs or more, such as --compare runs/a runs/b")
  short = [path.name for path in paths]
  names = short if len(set(short)) == len(short) else [str(workdir) for workdir in workdirs]
  return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(workdir: Path, name: str) -> Run:
  if not (workdir / "config.json").is_file():
    raise UserError(f"--compare: {workdir} is not a run directory, it has no config.json")
  scores, steps = {}, {}
  steps_of = {path: path.stem.rpartition("@")[2].partition(".")[0] for path in (workdir / "eval").glob("*@*.json")}
  for path, result in read_results(sorted(path for path, step in steps_of.items() if step.isdecimal())):
    step = steps_of[path]
    task = (result["dataset"], result["task"])
    if int(step) >= steps.get(task, 0):
      scores[task], steps[task] = result["metrics"], int(step)
  config = read_config(workdir)
  return Run(name, config, scores, steps, read_json_lines(workdir / "metrics.jsonl"))


def table(runs: Sequence[Run]) -> list[Row]:
  """Lists every metric of every task that any of the runs was scored on; the main metric of a task comes first."""
  rows = []
  tasks = {task for run in runs for task in run.scores}
  for task in sorted(tasks, key=lambda task: (task[0], not task[1].startswith("zeroshot"), task[1])):
    found = [run.scores.get(task, {}) for run in runs]
    names = list(dict.fromkeys(name for metrics in found for name in metrics))
    first = main_metric(names)
    for name in sorted(names, key=lambda name: name != first):
      rows.append(Row(*task, name, name == first, _cells(runs, task, name)))
  return rows


def _cells(runs: Sequence[Run], task: Task, metric: str) -> tuple[Cell | None, ...]:
  values = [run.scores.get(task, {}).get(metric) for run in runs]
  plain = metric in PLAIN_METRICS
  known = [value for value in values if value is not None]
  cells = []
  for number, (run, value) in enumerate(zip(runs, values, strict=True)):
    if value is None:
      cells.append(None)
      continue
    against = number and values[0] is not None
    change = value - values[0] if against else 0.0
    text = f"{change:+.3g}" if plain else f"{100 * change:+.1f}"
    better = None if plain or not change else change > 0
    best = not plain and len(known) > 1 and value == max(known)
    cells.append(Cell(figure(metric, value), text if against else "", better, best, run.steps[task]))
  return tuple(cells)


def in_terminal(runs: Sequence[Run], rows: Sequence[Row]) -> Table:
  """Makes a table of main metrics: a column for each run, the best in bold, with the difference to the first run."""
  shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
  shown.add_column("task", overflow="fold")
  shown.add_column("metric", overflow="fold")
  for run in runs:
    shown.add_column(Text(run.name), justify="right", overflow="fold")
  for row in rows:
    if not row.main:
      continue
    cells = []
    for cell in row.cells:
      words = Text("–") if cell is None else Text(cell.text, style="bold" if cell.best else "")
      if cell and cell.difference:
        words.append(f" ({cell.difference})", style="green" if cell.better else "red" if cell.better is False else "")
      cells.append(words)
    shown.add_row(Text(_task_name(row)), Text(row.metric), *cells)
  return shown


def _task_name(row: Row) -> str:
  return row.dataset if row.task.startswith("zeroshot") else f"{row.dataset} ({row.task.replace('_', ' ')})"


def write_comparison(path: str | os.PathLike, runs: Sequence[Run]) -> Path:
  """Writes the page, atomically: one HTML file that needs nothing else.

  Args:
    path: path of the HTML file.
    runs: the runs; the others are measured against the first.
  """
  rows = table(runs)
  page = render(
    "compare.html.j2",
    title=", ".join(run.name for run in runs),
    runs=runs,
    rows=rows,
    task_name=_task_name,
    same_steps=[len(set(run.steps.values())) <= 1 for run in runs],
    charts=overlaid(runs),
    differing=_differing(runs),
  )
  return write_atomically(path, page)


def overlaid(runs: Sequence[Run]) -> list[curves.Chart]:
  """Makes charts with a curve for each run: loss, main metrics of sets scored in training, learning rate, speed."""
  last = max((float(row["step"]) for run in runs for row in run.rows), default=0.0) or 1.0

  def under(key: str) -> Callable[[Sequence[Mapping[str, Any]]], list[tuple[float, float]]]:
    return functools.partial(curves.series, key=key)

  drawn = [("Loss", under("loss"), {"smooth": True})]
  for dataset, name in sorted(scored_sets(row for run in runs for row in run.rows).items()):
    drawn.append((f"{dataset}: {metric_name(name)}", under(f"{dataset}/{name}"), {"from_zero": True, "percent": True}))
  drawn += [
    ("Learning rate", under("learning_rate"), {"from_zero": True}),
    ("Images per second", speed_series, {"from_zero": True, "smooth": True}),
  ]
  made = []
  for title, read, options in drawn:
    lines = {run.name: read(run.rows) for run in runs}
    made.append(curves.chart(title, lines, last_step=last, **options))
  return [chart for chart in made if chart is not None]


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
  """Lists the config fields that are not alike in all runs: (dotted name, value in each run)."""
  flats = [dict(flat(run.config)) for run in runs]
  names = dict.fromkeys(name for fields in flats for name in fields)
  values = ((name, [fields.get(name, "–") for fields in flats]) for name in names)
  return [(name, each) for name, each in values if len(set(each)) > 1]
