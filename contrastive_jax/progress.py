"""A progress bar for embedding, on a terminal only: elsewhere nothing is printed."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def shown(batches: Iterator[np.ndarray], count: int, what: str, label: str = "") -> Iterator[np.ndarray]:
  """Yields the batches of row numbers, and shows how many of `count` rows are done, with rate and remaining time.

  Args:
    batches: row numbers in ascending order.
    count: number of rows.
    what: name of the rows, such as "images".
    label: what stands before the bar; "encoding" and `what` if empty.
  """
  name = TextColumn("{task.description}", style="bold", markup=False)
  columns = name, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
  console = Console(stderr=True)
  hidden = {"transient": True, "disable": not console.is_terminal}
  with Progress(*columns, TimeRemainingColumn(), console=console, **hidden) as bar:
    task = bar.add_task(label or f"encoding {what}", total=count, rate="")
    for rows in batches:
      yield rows
      bar.update(task, completed=int(rows.max()) + 1)
      speed = bar.tasks[0].speed
      bar.update(task, rate=f"{speed:,.0f} {what}/s" if speed else "")


def counted(count: int, what: str, label: str) -> Iterator[int]:
  """Yields 0 to `count` - 1, and shows how many are done as `shown` does."""
  for rows in shown((np.array([number]) for number in range(count)), count, what, label):
    yield int(rows[0])
