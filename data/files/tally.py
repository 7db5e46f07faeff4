"""Counts of what was asked of servers and of what went wrong."""

import threading
from collections import Counter


class Tally:
  """Counts in any number of threads without a lock, which a fork could leave locked for ever."""

  def __init__(self):
    self._own = threading.local()
    self._all: list[Counter[str]] = []

  def add(self, what: str, count: int = 1) -> None:
    """Counts something once or several times."""
    counter = getattr(self._own, "counter", None)
    if counter is None:
      counter = self._own.counter = Counter()
      self._all.append(counter)
    counter[what] += count

  def total(self) -> Counter[str]:
    """Returns the counts of all threads of this process."""
    return sum((Counter(dict(each)) for each in list(self._all)), Counter())
