"""Embeds images or texts into a file.

python embed.py --workdir=runs/emoji --images=FOLDER --output=images.parquet
python embed.py --workdir=runs/emoji --images=TABLE.csv --output=images.npy      # a column "path", and "id" if wanted
python embed.py --workdir=runs/emoji --texts=captions.txt --output=texts.parquet # a line each, or a column "text"

Parquet files have the columns "id" and "embedding"; beside NAME.npy the ids lie in NAME.ids.txt, one a line. What
cannot be read is left out and named.
"""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from contrastive_jax import cli
from contrastive_jax.errors import UserError
from contrastive_jax.inference import Model, load
from contrastive_jax.preprocess.images import DecodeError, decode
from contrastive_jax.runs import write_atomically

WORKDIR = flags.DEFINE_string("workdir", None, "A run, or weights imported by convert.py.")
IMAGES = flags.DEFINE_string("images", "", "A folder of images, with those below it, or a table with a column path.")
TEXTS = flags.DEFINE_string("texts", "", "A file of texts, one a line, or a table with a column text.")
OUTPUT = flags.DEFINE_string("output", None, "A .parquet or .npy file.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images or texts encoded at once.", lower_bound=1)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".jsonl", ".parquet")
# Rows that are written together: what is held in memory of a long list.
_CHUNK = 16_384
# Spreadsheets put a byte order mark in front.
_ENCODING = "utf-8-sig"
# Unreadable images that are named one by one.
MOST_NAMED = 5


def main() -> None:
  if not WORKDIR.value or not OUTPUT.value or bool(IMAGES.value) == bool(TEXTS.value):
    raise UserError("--workdir, --output and one of --images and --texts are needed")
  output = Path(OUTPUT.value)
  if output.suffix not in _WRITERS:
    raise UserError(f"--output={output} must end in {' or '.join(_WRITERS)}")
  ids, items = images(Path(IMAGES.value)) if IMAGES.value else texts(Path(TEXTS.value))
  if not ids:
    raise UserError(f"{IMAGES.value or TEXTS.value} holds nothing to embed")
  model = load(WORKDIR.value, STEP.value, batch_size=BATCH_SIZE.value, progress=True)
  unreadable = write(output, model, ids, items)
  print(f"{output} holds {len(ids) - len(unreadable):,} embeddings of {model.config.embed_dim} numbers.")
  if unreadable:
    print(f"{len(unreadable):,} images cannot be read and were left out: {', '.join(unreadable[:MOST_NAMED])}")


def images(source: Path) -> tuple[list[str], Sequence[Path]]:
  """Ids and paths: of a folder's images the path below it is the id.

  Args:
    source: a folder, or a table.

  Raises:
    UserError: if the table is not there, cannot be read or has no column "path".
  """
  if source.is_dir():
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [path.relative_to(source).as_posix() for path in found], found
  rows = list(_rows(source, "path"))
  return [str(row.get("id", row["path"])) for row in rows], [source.parent / row["path"] for row in rows]


def texts(source: Path) -> tuple[list[str], Sequence[str]]:
  """Ids and texts: of a file of lines the number of the line, from 1, is the id.

  Args:
    source: a file of lines, or a table.

  Raises:
    UserError: if it is not there, cannot be read or is a table without a column "text".
  """
  if source.suffix not in TABLES:
    with _reading(source):
      lines = _lines(source)
    return [str(number) for number in range(1, len(lines) + 1)], lines
  rows = list(_rows(source, "text"))
  return [str(row.get("id", number)) for number, row in enumerate(rows, 1)], [row["text"] for row in rows]


def write(output: Path, model: Model, ids: Sequence[str], items: Sequence) -> list[str]:
  """Embeds and writes, some thousands at a time.

  Args:
    output: ends in ".parquet" or ".npy"; is there only when it is complete.
    model: the encoder.
    ids: one an item.
    items: paths of images, or texts.

  Returns:
    The ids of what cannot be read.
  """
  unreadable: list[str] = []
  partial = output.with_name(f".{output.name}.partial")
  output.parent.mkdir(parents=True, exist_ok=True)
  with _discarded(partial), _WRITERS[output.suffix](partial, output, model.config.embed_dim) as append:
    for start in range(0, len(ids), _CHUNK):
      rows = range(start, min(start + _CHUNK, len(ids)))
      if isinstance(items[start], str):
        embeddings = model.encode_text([items[row] for row in rows])
      else:
        try:
          embeddings = model.encode_image([items[row] for row in rows])
        except (DecodeError, OSError):
          # Only now is it worth to read every file twice.
          readable = {row: _is_readable(items[row]) for row in rows}
          unreadable += [ids[row] for row in rows if not readable[row]]
          rows = [row for row in rows if readable[row]]
          if not rows:
            continue
          embeddings = model.encode_image([items[row] for row in rows])
      append([ids[row] for row in rows], embeddings)
  partial.replace(output)
  return unreadable


@contextlib.contextmanager
def _discarded(partial: Path) -> Iterator[None]:
  """Leaves nothing half written behind."""
  try:
    yield
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def _is_readable(path: Path) -> bool:
  try:
    decode(path)
  except (DecodeError, OSError):
    return False
  return True


@contextlib.contextmanager
def _parquet(partial: Path, output: Path, dim: int) -> Iterator:
  schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))])
  with pq.ParquetWriter(partial, schema) as writer:

    def append(ids: list[str], embeddings: np.ndarray) -> None:
      vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), dim)
      writer.write_table(pa.table([pa.array(ids), vectors], schema=schema))

    yield append


@contextlib.contextmanager
def _npy(partial: Path, output: Path, dim: int) -> Iterator:
  parts, names = [np.empty((0, dim), np.float32)], []

  def append(ids: list[str], embeddings: np.ndarray) -> None:
    parts.append(embeddings)
    names.extend(ids)

  yield append
  with open(partial, "wb") as file:
    np.save(file, np.concatenate(parts))
  write_atomically(output.with_suffix(".ids.txt"), "".join(f"{name}\n" for name in names))


_WRITERS = {".parquet": _parquet, ".npy": _npy}


def _rows(path: Path, column: str) -> Iterator[dict[str, str]]:
  if path.suffix not in TABLES:
    raise UserError(f"{path} must be a folder, or a table that ends in {', '.join(TABLES)}")
  with _reading(path):
    if path.suffix == ".parquet":
      rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
      rows = [json.loads(line) for line in _lines(path) if line.strip()]
    else:
      with open(path, encoding=_ENCODING, newline="") as file:
        rows = list(csv.DictReader(file))
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
      raise UserError(f"row {number} of {path} has no '{column}': name its column so")
    yield row


def _lines(path: Path) -> list[str]:
  # Not str.splitlines, which also splits at characters that captions hold, such as U+2028.
  with open(path, encoding=_ENCODING) as file:
    return [line.removesuffix("\n") for line in file]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  if not path.is_file():
    raise UserError(f"{path} does not exist: name a folder, a table or a file")
  try:
    yield
  except (ValueError, csv.Error) as error:
    raise UserError(
      f"{path} cannot be read ({str(error).splitlines()[0]}): save it as its name says, in UTF-8"
    ) from error


if __name__ == "__main__":
  cli.run(main)
