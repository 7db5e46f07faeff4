"""Reads labels and captions from the records of an evaluation set, some of which hold nothing that can be used."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from contrastive_jax.bad_records import retried
from contrastive_jax.evaluation.tasks import Images, PairSet, ReadSet
from contrastive_jax.evaluation.unreadable import UnreadableSet
from contrastive_jax.preprocess.decoding import DecodeError

# Records that are looked at before a set is scored: where a split has no labels, none of them has one.
GLANCE = 8

Answer = TypeVar("Answer")


def answers(
  records: Sequence[Any], read: Callable[[Any], Answer], blank: Answer
) -> tuple[list[Answer], dict[int, str]]:
  """Reads the answer, a label or captions, of each record.

  Args:
    records: the records of a split.
    read: a function that takes the answer from one record, and raises `DecodeError` where there is none.
    blank: the value that stands for an answer which cannot be read.

  Returns:
    One answer for each record, and, by the number of a record, why it has none.

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
  """Puts off reading the answers of a set until it is scored, since it can mean to read all pictures too.

  Args:
    records: the records of the split.
    read_one: a function that takes the answer from one record, as for `answers`.
    read_set: a function that reads all of them and returns the set.

  Raises:
    UserError: that of `read_set`, which is called now where `GLANCE` records, evenly spread, show that most have none.
  """
  chosen = range(0, len(records), max(1, -(-len(records) // GLANCE)))
  _, bad = answers(chosen, lambda index: read_one(records[index]), None)
  read_set = functools.cache(read_set)
  if 2 * len(bad) >= len(chosen):
    read_set()
  return read_set


def pair_set(name: str, images: Images, captions: Sequence[Sequence[str]]) -> PairSet:
  """Returns a set for retrieval, in which each image belongs with all its captions.

  Args:
    name: name of the set.
    images: the images.
    captions: the captions of each. An image without one is a bad record: it is left out when the set is scored, with
      what stands for its caption.
  """
  whole = [texts or [""] for texts in captions]
  owner = np.repeat(np.arange(len(whole)), [len(texts) for texts in whole])
  return PairSet(name, images, [text for texts in whole for text in texts], np.arange(len(whole)), owner)


def refuse_most(bad: dict[int, str], count: int, what: str, remedy: str) -> None:
  """Raises an `UnreadableSet` where so many records say nothing that another feature or split must be meant.

  A few are bad records, which the evaluation leaves out, counts and names.

  Args:
    bad: the records without an answer, as `answers` returned them.
    count: number of records.
    what: the beginning of the sentence, such as "split 'test' of the TFDS set 'a/b'".
    remedy: the end of the sentence.
  """
  if 2 * len(bad) >= count and bad:
    first, why = next(iter(bad.items()))
    raise UnreadableSet(f"{what} has {len(bad)} of {count} records {remedy.format(first=first, why=why)}")
