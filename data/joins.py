"""Captions that belong to the samples of an index by a key, such as those that a model has written for a set."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from data import tables
from data.sources.features import distinct, read_texts
from data.sources.index import MEASURED, TEXTS


@dataclasses.dataclass(frozen=True)
class Join:
  """A table of captions that belong to samples by a key, such as those that a model wrote for a set.

  Attributes:
    table: its path; see `tables.rows` for its formats.
    key: its column that names the sample, and what the index calls this: "key", or a column.
    texts: its columns of captions; empty is every other column.
  """

  table: Path
  key: str = "key"
  texts: tuple[str, ...] = ()

  def of(self, samples: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Returns the captions of all samples, in their order.

    Raises:
      UserError: if the key is not clear, a column is missing or known already, or no sample is met.
    """
    if self.key not in schema.names or schema.field(self.key).type != pa.large_string():
      raise UserError(f"the index has no column of texts {self.key!r} to join by: name another, or add it to --columns")
    rows = list(tables.rows(self.table, self.key, " or name it with --join_key"))
    columns = self.texts or tuple(dict.fromkeys(name for row in rows for name in row if name != self.key))
    if taken := [name for name in columns if name in schema.names or name in MEASURED]:
      raise UserError(f"the index has a column {taken[0]!r} already: rename that of {self.table}")
    ours = pa.chunked_array([chunk for table in samples for chunk in table[self.key].chunks], pa.large_string())
    theirs = pa.array([row[self.key] for row in rows], pa.large_string())
    for what, keys in (("the set", ours), (os.fspath(self.table), theirs)):
      if len(pc.unique(keys)) + keys.null_count - bool(keys.null_count) < len(keys):
        counts = pc.value_counts(keys.drop_null())
        twice = next(each["values"] for each in counts.to_pylist() if each["counts"] > 1)
        raise UserError(
          f"{self.key} {twice!r} occurs more than once in {what}: name a key that differs, with --join_key"
        )
    at = pc.index_in(ours, value_set=theirs)
    if at.null_count == len(at):
      raise UserError(f"no {self.key} of {self.table} is one of the set, which has {ours[0].as_py()!r}: name another")
    found = {name: [self._captions(number, row.get(name)) for number, row in enumerate(rows, 1)] for name in columns}
    return pa.table({name: pa.array(values, TEXTS).take(at) for name, values in found.items()})

  def _captions(self, number: int, value: Any) -> list[str] | None:
    try:
      return texts_of(value)
    except DecodeError as error:
      raise UserError(f"row {number} of {self.table}: {error}: write text there") from None


def texts_of(value: Any) -> list[str] | None:
  """Returns the captions in the value of a field, each once; None where there is none.

  Raises:
    DecodeError: if it holds something else.
  """
  return None if value is None else distinct(read_texts(value)) or None
