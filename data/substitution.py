"""Substitutes for records that are bad for good, and how word of them gets from the reader to the ledger."""

import json
from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped

from contrastive_jax.bad_records import BadRecord, BadRecords, retried
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from data.sources import Example, Source

# Records tried in the place of a bad one before the source counts as broken.
SUBSTITUTES = 16
# Characters of a reason that travel with a batch.
_MOST_SAID = 300


def read_or_substitute(source: Source, index: int, prepare: Callable[[Example], Example]) -> tuple[Example, str]:
  """Reads and prepares a sample, or the first after it that can be when it is bad for good.

  Args:
    source: the source.
    index: number of the sample that is wanted.
    prepare: a function that is applied to the sample, and may find it bad too.

  Returns:
    The sample, and a text from which `note` reads the bad ones before it; empty where there are none.

  Raises:
    UserError: if there is no good record among the next `SUBSTITUTES`.
    OSError: if a record cannot be read after several attempts.
  """
  failures = []
  for attempt in range(SUBSTITUTES + 1):
    at = (index + attempt) % len(source)
    try:
      example = retried(lambda at=at: prepare(source[at]))
    except DecodeError as error:
      shard = shard_of(source, at)
      failures.append((source.name, getattr(source, "split", ""), shard, at, str(error)[:_MOST_SAID]))
    else:
      return example, json.dumps(failures) if failures else ""
  said = failures[-1][-1]
  raise UserError(f"data source {source.name!r} has {SUBSTITUTES + 1} bad records in a row from {index} on ({said})")


def note(ledger: BadRecords, failed: Shaped[np.ndarray, " rows"], use: str = "training") -> None:
  """Tells the ledger what the rows of a batch failed to read.

  Args:
    ledger: the ledger that counts and names them.
    failed: the text that `read_or_substitute` returned for each row. Texts pass through every queue between processes.
    use: the purpose, as `BadRecord` names it.

  Raises:
    UserError: if too many records are bad.
  """
  met = [failure for said in failed[failed != ""].tolist() for failure in json.loads(said)]
  ledger.read(len(failed) + len(met))  # Each row is one good record, after those that it stands in for.
  for name, split, shard, index, reason in met:
    ledger.add(BadRecord(name, index, reason, split=split, shard=shard, use=use))
  ledger.check()


def shard_of(source: object, index: int) -> str:
  """Returns the file that holds a record, where the source knows."""
  find = getattr(source, "shard_of", None)
  return find(index) if find else ""
