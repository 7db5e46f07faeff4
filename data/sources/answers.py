"""What the records of an evaluation set say of their pictures, where some of them say nothing that can be used."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from contrastive_jax.bad_records import retried
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError

Answer = TypeVar("Answer")


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


def refuse_most(bad: dict[int, str], count: int, what: str, remedy: str) -> None:
  """Raises a `UserError` where so many records say nothing that another feature or split must be meant.

  A few are bad records, which the evaluation leaves out, counts and names.

  Args:
    bad: what `answers` returned.
    count: number of records.
    what: begins the sentence, such as "split 'test' of the TFDS set 'a/b'".
    remedy: ends it.
  """
  if 2 * len(bad) >= count and bad:
    first, why = next(iter(bad.items()))
    raise UserError(f"{what} has {len(bad)} of {count} records {remedy.format(first=first, why=why)}")
