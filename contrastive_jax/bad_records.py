"""Records that cannot be read: which are bad for good, how they are counted and named, and when there are too many.

A record whose content is damaged raises `DecodeError` and is replaced or left out; an I/O error may be gone at the next
attempt, and is raised when it is not. Nothing that reads records decides this for itself.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from contrastive_jax import runs
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError

FILE = "bad_records.jsonl"
# Seconds before each further attempt to read a record after an I/O error.
RETRY_DELAYS = (0.1, 1.0, 5.0)
# Records that the file names; more are only counted.
MOST_NAMED = 1000
# Records that have to be read before their share of bad ones says anything.
FEWEST_JUDGED = 1000

Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """One record that cannot be read.

  Attributes:
    set: the set or source it is in, such as "tfds/coco_captions".
    index: its number in the split.
    reason: the message of the decoder.
    split: the split, "" where the set has none.
    shard: the file that holds it, "" where that is not known.
    use: the purpose of the read: "training", "evaluation", "captions", "distillation", "embedding" or "conversion".
  """

  set: str
  index: int
  reason: str
  split: str = ""
  shard: str = ""
  use: str = "training"


class BadRecords:
  """Counts bad records, names the first in a file, and stops a run that has too many.

  Attributes:
    count: bad records met, one that is met again counts again.
    reads: records read, the bad ones included.
  """

  def __init__(self, path: Path | None = None, *, limit: float = 1.0):
    """Goes on with the file of an earlier start, in which nothing is named twice.

    Args:
      path: the file to write, one JSON object a line; None only counts.
      limit: the share of bad records, between 0 and 1, above which `check` raises; it is judged from `FEWEST_JUDGED`
        records on.
    """
    self._path, self._limit = path, limit
    self.count = self.reads = 0
    self._named = set(_named(path)) if path else set()

  def read(self, records: int) -> None:
    """Notes that records have been read, good or bad."""
    self.reads += records

  def add(self, record: BadRecord) -> None:
    """Counts a bad record, and names it unless it has been named before."""
    self.count += 1
    key = record.set, record.split, record.index
    if key in self._named or len(self._named) >= MOST_NAMED:
      return
    self._named.add(key)
    where = f"{record.set}@{record.split}" if record.split else record.set
    logging.getLogger(__name__).warning("%s: record %d is bad (%s)", where, record.index, record.reason)
    if self._path is None:
      return
    row = {name: value for name, value in dataclasses.asdict(record).items() if value != ""}
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with open(self._path, "ab") as file:
        file.write(runs.json_line(row))
    except OSError as error:  # A list that cannot be written must not end what it reports on.
      logging.getLogger(__name__).warning("%s cannot be written (%s)", self._path, error)

  def check(self) -> None:
    """Raises a `UserError` when the share of bad records is above the limit."""
    if self.reads >= FEWEST_JUDGED and self.count > self._limit * self.reads:
      listed = f": see {self._path}" if self._path else ""
      raise UserError(
        f"{self.count:,} of {self.reads:,} records are bad, more than data.max_bad_share={self._limit:g} allows{listed}"
      )


def readable(
  reads: Iterable[Callable[[], Read]],
  set_name: str,
  *,
  ledger: BadRecords,
  split: str = "",
  use: str = "training",
  numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, Read]]:
  """Yields (position in `reads`, what was read) of the records that can be read; the ledger gets the others.

  Args:
    reads: functions that read one record each.
    set_name: name of the set that the records are in.
    ledger: counts and names the bad ones.
    split: name of their split.
    use: the purpose, as `BadRecord` names it.
    numbers: number of each record in its split; None where all are read in their order.

  Raises:
    OSError: if a record cannot be read after several attempts.
  """
  for index, read in enumerate(reads):
    ledger.read(1)
    try:
      yield index, retried(read)
    except DecodeError as error:
      ledger.add(BadRecord(set_name, numbers[index] if numbers else index, str(error), split=split, use=use))


def retried(read: Callable[[], Read], delays: Iterable[int | float] | None = None) -> Read:
  """Reads, again after each delay where an I/O error comes.

  Args:
    read: a function that reads one record.
    delays: seconds before each further attempt; None is `RETRY_DELAYS`.

  Raises:
    OSError: if the last attempt fails too.
  """
  for delay in RETRY_DELAYS if delays is None else delays:
    try:
      return read()
    except OSError:
      time.sleep(delay)
  return read()


def _named(path: Path) -> Iterator[tuple[str, str, int]]:
  """Returns the records that a file names; lines that a kill or a full disk left broken are passed over."""
  with contextlib.suppress(FileNotFoundError):
    for row in runs.json_lines(path, "set", str):
      yield row["set"], row.get("split", ""), row.get("index")
