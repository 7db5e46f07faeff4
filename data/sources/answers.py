"""What the records of an evaluation set say of their pictures, where some of them say nothing that can be used."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from contrastive_jax.bad_records import retried
from contrastive_jax.evaluation.tasks import EvaluationSet
from contrastive_jax.evaluation.unreadable import UnreadableSet
from contrastive_jax.preprocess.decoding import DecodeError

# Records that are looked at before a set is scored: where a split has no labels, none of them has one.
GLANCE = 8

Answer = TypeVar("Answer")
# Reads the labels or the captions of a set that was opened; further calls return the same set.
ReadSet = Callable[[], EvaluationSet]


def answers(
  records: Sequence[Any], read: Callable[[Any], Answer], blank: Answer
) -> tuple[list[Answer], dict[int, str]]:
  """Reads what each record says.

  Args:
    records: of a split.
    read: takes it from one record, and raises `DecodeError` where there is nothing to take.
    blank: stands for what cannot be read.

  Returns:
    One answer a record, and by the number of a record why it has none.

  Raises:
    OSError: if a record cannot be read after several attempts.
  """
  found, bad = [], {}
  for index in range(len(records)):
    try:
      found.append(retried(lambda index=index: read(records[index])))
    except DecodeError as error:
      found.append(blank)
      bad[index] = str(error)
  return found, bad


def when_scored(records: Sequence[Any], read_one: Callable[[Any], Any], read_set: ReadSet) -> ReadSet:
  """Returns what reads the answers of a set once it is scored: to read them all can mean to read all pictures too.

  Args:
    records: of the split.
    read_one: takes the answer from one record, see `answers`.
    read_set: reads all of them.

  Raises:
    UserError: that of `read_set`, which is called now where `GLANCE` records, evenly spread, show that most have none.
  """
  chosen = range(0, len(records), max(1, -(-len(records) // GLANCE)))
  _, bad = answers(chosen, lambda index: read_one(records[index]), None)
  read_set = functools.cache(read_set)
  if 2 * len(bad) >= len(chosen):
    read_set()
  return read_set


def refuse_most(bad: dict[int, str], count: int, what: str, remedy: str) -> None:
  """Raises an `UnreadableSet` where so many records say nothing that another feature or split must be meant.

  A few are bad records, which the evaluation leaves out, counts and names.

  Args:
    bad: what `answers` returned.
    count: number of records.
    what: begins the sentence, such as "split 'test' of the TFDS set 'a/b'".
    remedy: ends it.
  """
  if 2 * len(bad) >= count and bad:
    first, why = next(iter(bad.items()))
    raise UnreadableSet(f"{what} has {len(bad)} of {count} records {remedy.format(first=first, why=why)}")
