"""Tables as people save them: CSV, TSV, JSON, JSON lines and Parquet, told apart by what is in them."""

import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contrastive_jax.errors import UserError, nearest

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# A byte order mark says which encoding follows; without one it is UTF-8.
_MARKS = (
  (b"\xff\xfe\0\0", "utf-32"),
  (b"\0\0\xfe\xff", "utf-32"),
  (b"\xff\xfe", "utf-16"),
  (b"\xfe\xff", "utf-16"),
  (b"\xef\xbb\xbf", "utf-8-sig"),
)
# Spreadsheets of different countries and programs save CSV with different ones.
_DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}


def is_table(path: Path) -> bool:
  """Says whether a file is a table: by its suffix in any case, or as Parquet by its content."""
  return _kind(path) in SUFFIXES


def rows(path: Path, column: str, otherwise: str = "") -> Iterator[dict[str, Any]]:
  """Yields the rows of a table, each with text in `column`.

  Args:
    path: path of the table. CSV may be separated by commas, semicolons or tabs, whichever makes `column` a column.
    column: name of the column that has to be there.
    otherwise: the end of the sentence about a column that is not there, such as " or name it with image_key".

  Raises:
    UserError: if the file cannot be read, has a column twice or lacks one, or a row is too long or has no text there.
  """
  kind = _kind(path)
  if kind not in SUFFIXES:
    raise UserError(f"{path} must be a folder, or a table that ends in {', '.join(SUFFIXES)}")
  with reading(path):
    if kind == ".parquet":
      found = _parquet(path, column, otherwise)
    elif kind in _DELIMITERS:
      found = _separated(path, column, _DELIMITERS[kind], otherwise)
    else:
      found = _json(path)
  for number, row in enumerate(found, 1):
    if not isinstance(row, dict):
      raise UserError(f"row {number} of {path} is a {type(row).__name__}, not an object with '{column}'")
    if None in row:
      raise UserError(f"row {number} of {path} has more fields than the header: put text that holds commas in quotes")
    if column not in row:
      meant = nearest(column, map(str, row))
      raise UserError(f"row {number} of {path} has no '{column}'{meant}: name its column so{otherwise}")
    if not isinstance(row[column], str):
      what = "nothing" if row[column] is None else f"a {type(row[column]).__name__}"
      raise UserError(f"row {number} of {path} has no '{column}' but {what}: write text there, or leave out the row")
    if "\0" in row[column]:
      raise UserError(f"row {number} of {path} has a NUL in its '{column}': save the table as text, in UTF-8")
    yield row


def lines(path: Path) -> list[str]:
  """Returns the lines of a text file without their ends.

  Raises:
    UserError: if the file is not there or is no text.
  """
  with reading(path):
    # Not str.splitlines, which also splits at characters that captions hold, such as U+2028.
    found = [line.removesuffix("\n") for line in io.StringIO(_text(path), newline=None)]
  binary = next((number for number, line in enumerate(found, 1) if "\0" in line), None)
  if binary is not None:
    raise UserError(f"{path} cannot be read (line {binary} holds a NUL): save it as text, in UTF-8")
  return found


def ids(path: Path, rows: Sequence[dict[str, Any]], otherwise: Sequence[Any]) -> list[str]:
  """Returns the ids of the rows of a table as text: those of its column "id" where it has one.

  Args:
    path: path of the table, for errors.
    rows: the rows. Where one of them has an id, text or an integer, each needs one.
    otherwise: the ids of the rows of a table without that column.

  Raises:
    UserError: if one is missing, is neither text nor an integer, would break lines, or occurs twice.
  """
  first: dict[str, int] = {}
  values = [row.get("id") for row in rows] if any("id" in row for row in rows) else otherwise
  for number, value in enumerate(values, 1):
    if value is None or value == "" or value != value:  # NaN differs from itself.
      raise UserError(f"row {number} of {path} has no 'id': give each row one, or leave out the column")
    if isinstance(value, bool) or not isinstance(value, str | int) or not _is_line(str(value)):
      raise UserError(
        f"row {number} of {path} has the id {value!r}: write ids as text without line breaks, or integers"
      )
    if first.setdefault(str(value), number) != number:
      raise UserError(f"rows {first[str(value)]} and {number} of {path} both have the id {value!r}: ids must differ")
  return list(first)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """Makes one sentence of whatever goes wrong while a file is read."""
  if path.is_dir():
    raise UserError(f"{path} is a folder: name a table or a file")
  if not path.is_file():
    raise UserError(f"{path} does not exist: name a folder, a table or a file")
  try:
    yield
  except UserError:
    raise
  except (ValueError, RecursionError, OSError, csv.Error) as error:
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} cannot be read ({reason}): save it as its name says, in UTF-8") from error


def _kind(path: Path) -> str:
  """Returns the suffix in lower case, and that of Parquet for a Parquet file, whatever it is called."""
  if path.is_file():
    with reading(path), open(path, "rb") as file:
      if file.read(4) == b"PAR1":
        return ".parquet"
  return path.suffix.lower()


def _text(path: Path) -> str:
  data = path.read_bytes()
  encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
  return data.decode(encoding)


def _separated(path: Path, column: str, delimiters: Sequence[str], otherwise: str) -> list[dict[str, Any]]:
  text = _text(path)
  headers = {each: next(csv.reader(io.StringIO(text, newline=""), delimiter=each), []) for each in delimiters}
  delimiter = next((each for each in delimiters if column in headers[each]), None)
  if delimiter is None:
    raise UserError(_without(path, column, headers[delimiters[0]], otherwise))
  _no_column_twice(path, headers[delimiter])
  return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def _json(path: Path) -> list[Any]:
  """Reads a list of rows, or a row a line, whatever the file is called."""
  text = _text(path)

  def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _no_column_twice(path, [key for key, _ in pairs])
    return dict(pairs)

  if text.lstrip().startswith("["):
    return json.loads(text, object_pairs_hook=no_key_twice)
  found = []
  for number, line in enumerate(io.StringIO(text, newline=None), 1):
    try:
      if line.strip():
        found.append(json.loads(line, object_pairs_hook=no_key_twice))
    except json.JSONDecodeError as error:
      if found:
        raise UserError(f"line {number} of {path} is no JSON ({error.msg}): mend or remove it") from None
      whole = json.loads(text)
      raise UserError(f"{path} holds a {type(whole).__name__}: write a list with one object a row") from None
  return found


def _parquet(path: Path, column: str, otherwise: str) -> list[dict[str, Any]]:
  # An open file, since Arrow takes some names for addresses.
  with open(path, "rb") as file:
    table = pq.ParquetFile(file).read()
  _no_column_twice(path, table.column_names)
  if column not in table.column_names:
    raise UserError(_without(path, column, table.column_names, otherwise))
  return table.to_pylist()


def _without(path: Path, column: str, header: Sequence[str], otherwise: str) -> str:
  known = ", ".join(repr(name) for name in header[:8]) + (", ..." if len(header) > 8 else "")
  return f"{path} has no column '{column}'{nearest(column, header)}: it has {known or 'none'}, name one so{otherwise}"


def _no_column_twice(path: Path, names: Sequence[str]) -> None:
  twice = next((name for name, count in Counter(names).items() if count > 1), None)
  if twice is not None:
    raise UserError(f"{path} has the column {twice!r} more than once: which is meant cannot be known, rename one")


def _is_line(text: str) -> bool:
  return not any(letter in text for letter in "\r\n") and text == text.encode(errors="replace").decode()
