"""Embeds images or texts into a file.

python embed.py --workdir=runs/emoji --images=FOLDER --output=images.parquet
python embed.py --workdir=runs/emoji --images=TABLE.csv --output=images.npy      # a column "path", and "id" if wanted
python embed.py --workdir=runs/emoji --texts=captions.txt --output=texts.parquet # a line each, or a column "text"

Parquet files have the columns "id" and "embedding"; beside NAME.npy the ids lie in NAME.ids.txt, one a line. The model,
its step and the version are in the metadata of the Parquet schema, or in NAME.about.json. What cannot be read is left
out and named. Tables end in .csv, .tsv, .json, .jsonl or .parquet.
"""

import collections
import contextlib
import csv
import importlib.metadata
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from PIL import Image

from contrastive_jax import cli, paths
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
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output if it is already there.")

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Formats that Pillow recognises but does not decode by itself, or that are not pictures.
_NOT_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# What opens pictures that Pillow does not.
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
# Rows that are written together: what is held in memory of a long list.
_CHUNK = 16_384
# Spreadsheets put a byte order mark in front.
_ENCODING = "utf-8-sig"
# Unreadable images that are named one by one.
MOST_NAMED = 5


def main() -> None:
  if not WORKDIR.value or not OUTPUT.value or bool(IMAGES.value) == bool(TEXTS.value):
    raise UserError("--workdir, --output and one of --images and --texts are needed")
  output = paths.file_to_write("--output", OUTPUT.value)
  workdir = paths.run_to_read("--workdir", WORKDIR.value)
  if output.suffix not in _WRITERS:
    raise UserError(f"--output={output} must end in {' or '.join(_WRITERS)}")
  there = next((path for path in (output, *beside(output)) if path.exists()), None)
  if there and not OVERWRITE.value:
    raise UserError(f"--output={output}: {there} already exists, name another file or add --overwrite")
  source = paths.typed("--images", IMAGES.value) if IMAGES.value else paths.typed("--texts", TEXTS.value)
  ids, items = images(source) if IMAGES.value else texts(source)
  if IMAGES.value and source.is_dir():
    for suffix, count in unopened(source).items():
      remedy = f"save them as PNG, or decode them with {PACKAGES[suffix]}"
      print(f"{count:,} {suffix} files cannot be opened and are left out: {remedy}")
  if not ids:
    raise UserError(f"{source} holds nothing to embed")
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=True)
  about = {"model": WORKDIR.value, "step": str(model.step), "version": _version()}
  unreadable = write(output, model, ids, items, about)
  print(f"{output} holds {len(ids) - len(unreadable):,} embeddings of {model.config.embed_dim} numbers.")
  if unreadable:
    print(f"{len(unreadable):,} images cannot be read and were left out: {', '.join(unreadable[:MOST_NAMED])}")


def images(source: Path) -> tuple[list[str], Sequence[Path]]:
  """Ids and paths: of a folder's images the path below it is the id, see `paths.as_id`. Linked folders are followed.

  Args:
    source: a folder, or a table.

  Raises:
    UserError: if the table is not there, cannot be read or has no column "path".
  """
  if source.is_dir():
    found = sorted(path for path in paths.files_below(source) if _is_picture(path))
    return [paths.as_id(path.relative_to(source).as_posix()) for path in found], found
  rows = list(_rows(source, "path"))
  return _ids(source, [row.get("id", row["path"]) for row in rows]), [source.parent / row["path"] for row in rows]


def texts(source: Path) -> tuple[list[str], Sequence[str]]:
  """Ids and texts: of a file of lines the number of the line, from 1, is the id.

  Args:
    source: a file of lines, or a table.

  Raises:
    UserError: if it is not there, cannot be read or is a table without a column "text".
  """
  if _kind(source) not in TABLES:
    with _reading(source):
      lines = _lines(source)
    return [str(number) for number in range(1, len(lines) + 1)], lines
  rows = list(_rows(source, "text"))
  return _ids(source, [row.get("id", number) for number, row in enumerate(rows, 1)]), [row["text"] for row in rows]


def unopened(folder: Path) -> dict[str, int]:
  """Returns how many pictures of each type below a folder need a package that is not installed, by suffix."""
  suffixes = (path.suffix.lower() for path in paths.files_below(folder))
  return dict(collections.Counter(suffix for suffix in suffixes if suffix in PACKAGES and suffix not in _opened()))


def beside(output: Path) -> tuple[Path, ...]:
  """Returns the files that are written beside the output."""
  return (output.with_suffix(".ids.txt"), output.with_suffix(".about.json")) if output.suffix == ".npy" else ()


def write(
  output: Path, model: Model, ids: Sequence[str], items: Sequence, about: Mapping[str, str] | None = None
) -> list[str]:
  """Embeds and writes, some thousands at a time.

  Args:
    output: ends in ".parquet" or ".npy"; is there only when it is complete.
    model: the encoder.
    ids: one an item.
    items: paths of images, or texts.
    about: what is written with the embeddings, such as the model that they come from.

  Returns:
    The ids of what cannot be read.
  """
  unreadable: list[str] = []
  partial = output.with_name(f".{output.name}.partial")
  output.parent.mkdir(parents=True, exist_ok=True)
  with _discarded(partial), _WRITERS[output.suffix](partial, output, model.config.embed_dim, about or {}) as append:
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
def _parquet(partial: Path, output: Path, dim: int, about: Mapping[str, str]) -> Iterator:
  metadata = {f"contrastive_jax.{key}": value for key, value in about.items()}
  schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))], metadata=metadata)
  with pq.ParquetWriter(partial, schema) as writer:

    def append(ids: list[str], embeddings: np.ndarray) -> None:
      vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel(), pa.float32()), dim)
      writer.write_table(pa.table([pa.array(ids), vectors], schema=schema))

    yield append


@contextlib.contextmanager
def _npy(partial: Path, output: Path, dim: int, about: Mapping[str, str]) -> Iterator:
  parts, names = [np.empty((0, dim), np.float32)], []

  def append(ids: list[str], embeddings: np.ndarray) -> None:
    parts.append(embeddings)
    names.extend(ids)

  yield append
  with open(partial, "wb") as file:
    np.save(file, np.concatenate(parts))
  ids_file, about_file = beside(output)
  write_atomically(ids_file, "".join(f"{name}\n" for name in names))
  write_atomically(about_file, json.dumps(dict(about), indent=2) + "\n")


_WRITERS = {".parquet": _parquet, ".npy": _npy}


def _rows(path: Path, column: str) -> Iterator[dict[str, str]]:
  kind = _kind(path)
  if kind not in TABLES:
    raise UserError(f"{path} must be a folder, or a table that ends in {', '.join(TABLES)}")
  with _reading(path):
    if kind == ".parquet":
      rows = pq.read_table(path).to_pylist()
    elif kind == ".json":
      rows = json.loads(path.read_text(_ENCODING))
      if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}: write a list with one object a row")
    elif kind == ".jsonl":
      rows = [json.loads(line) for line in _lines(path) if line.strip()]
    else:
      with open(path, encoding=_ENCODING, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True))
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
      raise UserError(f"row {number} of {path} has no '{column}': name its column so")
    if None in row:
      raise UserError(f"row {number} of {path} has more fields than the header: put text that holds commas in quotes")
    yield row


def _kind(path: Path) -> str:
  """The suffix in lower case; of a Parquet file that suffix, whatever it is called."""
  if path.is_file():
    with open(path, "rb") as file:
      if file.read(4) == b"PAR1":
        return ".parquet"
  return path.suffix.lower()


def _ids(path: Path, values: Sequence) -> list[str]:
  """Ids as strings; refuses those that are missing, that occur twice, or that would break lines."""
  first: dict[str, int] = {}
  for number, value in enumerate(values, 1):
    if value is None or value == "" or value != value:  # NaN differs from itself.
      raise UserError(f"row {number} of {path} has no 'id': give each row one, or leave out the column")
    if isinstance(value, list | dict | float) or any(letter in str(value) for letter in "\r\n"):
      raise UserError(
        f"row {number} of {path} has the id {value!r}: write ids as text without line breaks, or integers"
      )
    if first.setdefault(str(value), number) != number:
      raise UserError(f"rows {first[str(value)]} and {number} of {path} both have the id {value!r}: ids must differ")
  return list(first)


def _opened() -> frozenset[str]:
  """Suffixes of the pictures that this installation of Pillow decodes."""
  formats = Image.registered_extensions()
  return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in _NOT_PICTURES)


def _is_picture(path: Path) -> bool:
  if path.suffix:
    return path.suffix.lower() in _opened()
  try:
    with Image.open(path) as image:
      return image.format not in _NOT_PICTURES
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return False


def _version() -> str:
  try:
    return importlib.metadata.version("contrastive_jax")
  except importlib.metadata.PackageNotFoundError:
    # A checkout that is not installed.
    return tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]["version"]


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
