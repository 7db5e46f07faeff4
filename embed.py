"""Embeds images or texts into a file, or those of a whole set into shards.

python embed.py --workdir=runs/emoji --images=FOLDER --output=images.parquet
python embed.py --workdir=runs/emoji --images=TABLE.csv --output=images.npy      # a column "path", and "id" if wanted
python embed.py --workdir=runs/emoji --texts=captions.txt --output=texts.parquet # a line each, or a column "text"
python embed.py --workdir=runs/emoji --source=folder/FOLDER --output=embeddings  # any set of pairs, by its name
python embed.py --workdir=runs/emoji --source=folder/FOLDER --of=texts --output=captions

Parquet files have the columns "id" and "embedding"; beside NAME.npy the ids lie in NAME.ids.txt, one a line. The model,
its step and the version are in the metadata of the Parquet schema, or in NAME.about.json. What cannot be read is left
out, and listed in OUTPUT.bad_records.jsonl. Tables end in .csv, .tsv, .json, .jsonl or .parquet.

The output of --source is a folder of Parquet files. Names of sets are those of `config.data.sources`. After an
interruption the same command goes on with the shards that are left. With --scheduler the workers of a Dask cluster do
the work, each with a model of its own: the run, the set and the output have to lie where all of them see them.
"""

import contextlib
import functools
import os
from pathlib import Path

from absl import flags

from contrastive_jax import __version__, cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.loading import load
from data import embedding_files, embedding_shards, executors, listings, named

WORKDIR = flags.DEFINE_string("workdir", None, "A run, or weights imported by convert.py.")
IMAGES = flags.DEFINE_string(
  "images", "", "Folder whose images are embedded, subfolders included, or a table with a column path."
)
TEXTS = flags.DEFINE_string("texts", "", "File with one text a line, or a table with a column text.")
SOURCE = flags.DEFINE_string("source", "", "Set of pairs that is embedded, such as table/photos.csv or parquet/photos.")
OF = flags.DEFINE_enum(
  "of", embedding_shards.IMAGES, [embedding_shards.IMAGES, embedding_shards.TEXTS], "What of the set is embedded."
)
SHARD_ROWS = flags.DEFINE_integer("shard_rows", 100_000, "Samples of the set in each file.", lower_bound=1)
SCHEDULER = flags.DEFINE_string("scheduler", "", "Address of a Dask scheduler whose workers embed the set instead.")
OUTPUT = flags.DEFINE_string(
  "output", None, "File to write, which ends in .parquet or .npy; or folder for the shards of a set."
)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to use; the newest if not given.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Number of images or texts encoded at once.", lower_bound=1)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the output where it already exists.")

flags.adopt_module_key_flags(named)

# What was left out and is named on the terminal.
MOST_NAMED = 5


def main() -> None:
  if not WORKDIR.value or not OUTPUT.value or [bool(each.value) for each in (IMAGES, TEXTS, SOURCE)].count(True) != 1:
    raise UserError("--workdir, --output and one of --images, --texts and --source are needed")
  if SOURCE.value:
    embed_set()
    return
  idle = [each.name for each in (OF, SHARD_ROWS, SCHEDULER, *named.ALL) if each.present]
  if idle:
    raise UserError(f"--{idle[0]} belongs to --source: leave it out, or name a set with --source")
  flag = IMAGES if IMAGES.value else TEXTS
  source = paths.typed(f"--{flag.name}", flag.value)
  output = output_to_write(source)
  workdir = paths.run_to_read("--workdir", WORKDIR.value)
  ids, items = listings.images(source) if IMAGES.value else listings.texts(source)
  if IMAGES.value and source.is_dir():
    for suffix, (count, package) in listings.unopened(source).items():
      print(f"Left out {count:,} {suffix} that nothing here opens: pip install {package}, or save as PNG")
  blank = []
  if TEXTS.value:
    ids, items, blank = listings.without_blank(ids, items)
  if not ids:
    raise UserError(f"--{flag.name}={source} holds nothing to embed")
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=True)
  about = {"model": WORKDIR.value, "step": str(model.step), "version": __version__}
  unreadable = embedding_files.write(output, model, ids, items, about)
  written = len(ids) - len(unreadable)
  print(f"{output} holds {written:,} embedding{'s' * (written != 1)} of {model.config.embed_dim} numbers.")
  if blank:
    print(f"Left out {len(blank):,} that hold no text: {shown(blank)}")
  if unreadable:
    *_, listed = embedding_files.beside(output)
    print(f"Left out {len(unreadable):,} that cannot be read, see {listed}: {shown(unreadable)}")


def embed_set() -> None:
  folder = paths.folder_to_write("--output", OUTPUT.value)
  workdir = paths.run_to_read("--workdir", WORKDIR.value)
  source, asked = named.open_named(SOURCE.value, whole=bool(SCHEDULER.value))
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=not SCHEDULER.value)
  about = {"model": WORKDIR.value, "step": str(model.step), "version": __version__, **asked}
  shards = -(-len(source) // SHARD_ROWS.value)
  rows = left_out = 0
  with executors.executor(1, SCHEDULER.value) if SCHEDULER.value else contextlib.nullcontext() as executor:
    written = embedding_shards.write(
      folder,
      model,
      source,
      of=OF.value,
      shard_rows=SHARD_ROWS.value,
      about=about,
      overwrite=OVERWRITE.value,
      executor=executor,
      model_of_a_worker=functools.partial(load, os.path.abspath(workdir), model.step, batch_size=BATCH_SIZE.value),
    )
    for number, shard in enumerate(written, 1):
      rows, left_out = rows + shard.rows, left_out + shard.left_out
      kept = ", as before" * shard.kept
      bad = f"; {shard.left_out:,} cannot be read" * bool(shard.left_out)
      print(f"{shard.file} holds {shard.rows:,} embeddings{kept} ({number:,} of {shards:,}){bad}", flush=True)
  print(f"{folder} holds {rows:,} embedding{'s' * (rows != 1)} of {model.config.embed_dim} numbers.")
  if left_out:
    print(f"Left out {left_out:,} that cannot be read, see the files {folder}/*.bad_records.jsonl.")


def output_to_write(source: Path) -> Path:
  """Returns the output, once it and the files beside it can be written and replace nothing that they must not."""
  output = paths.file_to_write("--output", OUTPUT.value)
  if output.suffix not in embedding_files.WRITERS:
    raise UserError(f"--output={output} must end in {' or '.join(embedding_files.WRITERS)}")
  written = (output, *embedding_files.beside(output))
  for path in written:
    paths.file_to_write("--output", path)
  there = next((path for path in written if path.exists()), None)
  if there and not OVERWRITE.value:
    raise UserError(f"--output={output}: {there} already exists, name another file or add --overwrite")
  if there and any(path.exists() and path.samefile(source) for path in written if source.exists()):
    raise UserError(f"--output={output} would replace what is to be embedded: name another file")
  return output


def shown(ids: list[str]) -> str:
  return ", ".join(ids[:MOST_NAMED]) + (", ..." if len(ids) > MOST_NAMED else "")


if __name__ == "__main__":
  cli.run(main)
