"""Builds the index of a set in shards: once per set, by several processes or a cluster, a file at a time.

What is known of a file is a piece, an Arrow file of its own, which is kept until all files are done: after an
interruption the same command goes on with the files that are left.
"""

import concurrent.futures
import dataclasses
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from contrastive_jax import runs
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import formats
from contrastive_jax.preprocess.decoding import DecodeError
from data import executors
from data.files import Facts, Files, is_local
from data.joins import Join, texts_of
from data.sources import index as layout
from data.sources.features import read_texts
from data.sources.formats import FORMATS
from data.sources.pictures import draw_of
from data.sources.scan import DamagedFile, Found, LeftOut

_PIECES = "pieces"


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is asked for of each sample.

  Attributes:
    kind: the kind of the set, one of `FORMATS`.
    image_key: field of the picture; "" is the only one that holds pictures.
    texts: fields that hold captions: a text or a list of them.
    columns: fields that hold a number, a truth value or a text.
  """

  kind: str
  image_key: str = ""
  texts: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()


class Piece(NamedTuple):
  """What is known of a file: an Arrow file as bytes, or why there is none; and how many samples were left out, why."""

  rows: bytes
  damage: str
  left_out: dict[str, int]


class Scanned(NamedTuple):
  """A `Piece` that was read back."""

  rows: pa.Table
  damage: str
  left_out: Mapping[str, int]


class Built(NamedTuple):
  """The outcome of `build`: its folder, samples, how many others were left out and why, and how many each join met."""

  folder: Path
  rows: int
  left_out: dict[str, int]
  joined: list[int]


def scan_file(file: str, wanted: Wanted) -> Piece:
  """Reads a file front to back; runs in a process or on a machine of its own.

  Raises:
    UserError: if what was asked for is not clear or cannot be stored.
  """
  left_out: Counter[str] = Counter()
  columns: dict[str, list[Any]] = {name: [] for name in (*layout.MEASURED, *wanted.texts, *wanted.columns)}
  try:
    with Files().opened(file) as stream:
      scan = FORMATS[wanted.kind].scan
      for found in scan(stream, wanted.image_key, frozenset((*wanted.texts, *wanted.columns))):
        row = _row(file, found, wanted) if isinstance(found, Found) else found
        if isinstance(row, LeftOut):
          left_out[row.why] += 1
          continue
        for name, values in columns.items():
          values.append(row[name])
  except DamagedFile as error:
    return Piece(b"", str(error), {})
  except UserError as error:
    raise UserError(f"{file}: {error}") from None
  arrays = {name: _array(file, name, values, wanted) for name, values in columns.items()}
  sink = pa.BufferOutputStream()
  table = pa.table(arrays)
  with pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
  return Piece(sink.getvalue().to_pybytes(), "", dict(left_out))


def build(
  wanted: Wanted,
  names: Sequence[str],
  folder: Path,
  executor: concurrent.futures.Executor,
  *,
  skip_damaged: bool = False,
  joins: Sequence[Join] = (),
) -> Built:
  """Builds the index of a set, or goes on with building it. Files that an older index of it knows are not read again.

  Args:
    wanted: what is asked for.
    names: the files of the set.
    folder: where the index is written; an older one is replaced once this one is whole.
    executor: what runs `scan_file`, such as a pool of processes or that of a Dask client.
    skip_damaged: leaves out damaged files, which are named in the index; otherwise they end it.
    joins: tables of further captions of the samples.

  Raises:
    UserError: if files are damaged, hold no sample, disagree about the type of a column, or lack what was asked for.
  """
  pieces = folder / _PIECES
  reader = Files()
  facts = {name: reader.facts(name) for name in names}
  places = {name: pieces / _piece(name, facts[name], wanted) for name in names}
  known = _known(wanted, folder, facts)
  missing = [name for name in names if name not in known and not places[name].is_dir()]
  pieces.mkdir(parents=True, exist_ok=True)
  work = {name: (name, wanted) for name in missing}
  for name, piece in executors.each(executor, scan_file, work, "files", "indexing"):
    _put(places[name], piece)
  found = {name: known.get(name) or _kept(places[name]) for name in names}
  built = _joined(wanted, found, facts, folder, skip_damaged, joins)
  shutil.rmtree(pieces)
  return built


def _known(wanted: Wanted, folder: Path, facts: Mapping[str, Facts]) -> dict[str, Scanned]:
  """Returns what an older index of the same request knows of the files that have not changed since."""
  if not (folder / layout.ABOUT).is_file():
    return {}
  older = layout.Index(os.fspath(folder), "data.index", Files())
  if runs.digest(older.wanted) != runs.digest(dataclasses.asdict(wanted)):
    return {}
  return {
    each.file: Scanned(older.table(older.rows_of(number)), "", each.left_out)
    for number, each in enumerate(older.files)
    if each.rows and each.file in facts and facts[each.file] == Facts(each.size, each.stamp)
  }


def _joined(
  wanted: Wanted,
  found: Mapping[str, Scanned],
  facts: Mapping[str, Facts],
  folder: Path,
  skip_damaged: bool,
  joins: Sequence[Join],
) -> Built:
  """Puts what was found together in the order of the files."""
  damaged = {name: each.damage for name, each in found.items() if each.damage}
  if damaged and not skip_damaged:
    first, *others = damaged
    more = f", and {len(others)} more of {len(found)} files are damaged" if others else ""
    raise UserError(
      f"{first} cannot be indexed, {damaged[first]}{more}: copy it again, or leave damaged files out with"
      " --skip_damaged"
    )
  whole = {name: each for name, each in found.items() if name not in damaged}
  left_out = sum((Counter(each.left_out) for each in whole.values()), Counter())
  tables = {name: each.rows for name, each in whole.items()}
  rows = sum(table.num_rows for table in tables.values())
  if not rows:
    why = "; ".join(f"{count:,} with {reason}" for reason, count in left_out.most_common(3)) or "the files are empty"
    raise UserError(f"no sample was found in {len(whole):,} files: {why}")
  schema = _schema(wanted, tables)
  added = [join.of(list(tables.values()), schema) for join in joins]
  texts = [name for name in wanted.texts if name in schema.names]
  for each in added:
    for name in each.column_names:
      schema = schema.append(pa.field(name, layout.TEXTS))
      texts.append(name)
  writer, start = layout.Writer(folder, schema), 0
  for table in tables.values():
    columns = {name: table[name] for name in schema.names if name in table.column_names}
    for each in added:
      columns |= {name: each[name].slice(start, len(table)) for name in each.column_names}
    absent = {name: pa.nulls(len(table), schema.field(name).type) for name in schema.names if name not in columns}
    writer.append(pa.table(columns | absent).select(schema.names).cast(schema))
    start += len(table)
  files = [
    layout.IndexedFile(_relative(name, folder), facts[name].size, facts[name].stamp, len(each.rows), each.left_out)
    for name, each in whole.items()
  ]
  writer.close(
    wanted=dataclasses.asdict(wanted),
    texts=texts,
    columns=[name for name in wanted.columns if name in schema.names],
    files=files,
    damaged={_relative(name, folder): why for name, why in damaged.items()},
  )
  return Built(folder, rows, dict(left_out), [each.num_rows - each[0].null_count for each in added])


def _row(file: str, found: Found, wanted: Wanted) -> dict[str, Any] | LeftOut:
  if found.raw:
    height, width, channels = found.raw
  else:
    size = formats.size_of(found.picture)
    if size is None:
      return LeftOut(found.key, "bytes that are no picture which can be decoded here")
    (width, height), channels = size, 0
  try:
    texts = {name: texts_of(found.said.get(name)) for name in wanted.texts}
    others = {name: _scalar(name, found.said.get(name)) for name in wanted.columns}
  except DecodeError as error:
    return LeftOut(found.key, str(error))
  return {
    "key": found.key,
    "offset": found.place.offset,
    "size": found.place.size,
    "crc": zlib.crc32(found.picture),
    "width": width,
    "height": height,
    "channels": channels,
    "draw": draw_of(f"{os.path.basename(file)}/{found.key}"),
    **texts,
    **others,
  }


def _scalar(name: str, value: Any) -> bool | int | float | str | None:
  if isinstance(value, bytes):
    (value,) = read_texts(value)
  if value is not None and not isinstance(value, bool | int | float | str):
    raise DecodeError(f"{name!r} that is a {type(value).__name__}")
  return value


def _array(file: str, name: str, values: list[Any], wanted: Wanted) -> pa.Array:
  kind = layout.TEXTS if name in wanted.texts else layout.MEASURED.get(name)
  try:
    found = pa.array(values, kind)
  except (pa.ArrowException, OverflowError) as error:
    raise UserError(f"{file}: the column {name!r} cannot be stored ({' '.join(str(error).split())[:100]})") from None
  return found.cast(pa.large_string()) if pa.types.is_string(found.type) else found


def _schema(wanted: Wanted, tables: Mapping[str, pa.Table]) -> pa.Schema:
  """Returns the schema that fits all files; a field that no sample has is left out."""
  fields = dict(layout.MEASURED)
  for name in (*wanted.texts, *wanted.columns):
    told = {file: table[name] for file, table in tables.items() if name in table.column_names}
    kinds = {column.type: file for file, column in told.items() if column.null_count < len(column)}
    if kinds:
      fields[name] = _common(name, kinds)
  absent = [name for name in wanted.columns if name not in fields]
  if absent:
    raise UserError(
      f"no sample has the column {absent[0]!r}: leave it out of --columns, or write its name as it is there"
    )
  if not any(name in fields for name in wanted.texts):
    raise UserError(f"no sample has a caption in {', '.join(wanted.texts)}: name its field with --texts")
  return pa.schema(list(fields.items()))


def _common(name: str, kinds: Mapping[pa.DataType, str]) -> pa.DataType:
  if len(kinds) == 1:
    return next(iter(kinds))
  if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
    return pa.float64()
  (one, first), (other, second), *_ = ((str(kind), file) for kind, file in kinds.items())
  raise UserError(f"the column {name!r} is {one} in {first} and {other} in {second}: leave it out of --columns")


def _put(place: Path, piece: Piece) -> None:
  def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "rows.arrow").write_bytes(piece.rows)
    runs.write_object(folder / "about.json", {"damage": piece.damage, "left_out": piece.left_out})

  runs.write_folder(place, write)


def _kept(place: Path) -> Scanned:
  about = runs.read_object(place / "about.json")
  if about["damage"]:
    return Scanned(pa.table({}), about["damage"], {})
  return Scanned(pa.ipc.open_file(pa.memory_map(os.fspath(place / "rows.arrow"))).read_all(), "", about["left_out"])


def _piece(name: str, facts: Facts, wanted: Wanted) -> str:
  """Returns the name of the piece of a file, another if the file or what is asked for changes."""
  return runs.digest([name, dataclasses.asdict(facts), dataclasses.asdict(wanted)])[:32]


def _relative(name: str, folder: Path) -> str:
  """Returns the path of a file from the folder of the index, so that both can move together; an address as it is."""
  return os.path.relpath(name, folder) if is_local(name) else name
