"""Builds the index of a set in shards: where each picture is, its size, its captions and the columns asked for.

python -m data.index 'webdataset/photos/{000..123}.tar'
python -m data.index 'webdataset/photos/{000..123}.tar' --columns=similarity,license --processes=8
python -m data.index tfrecord/photos --image_key=image/encoded --texts=image/caption
python -m data.index 'webdataset/photos/{000..123}.tar' --join=recaptions.parquet
python -m data.index 'webdataset/photos/{000..123}.tar' --scheduler=tcp://10.0.0.1:8786

Put a name with braces or stars in quotes. The index lies beside the files, or where --output says. After an
interruption the same command goes on with the files that are left. Later it reads files that are new or have changed.
"""

import os
from pathlib import Path

from absl import flags

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError, require_known
from data import executors, indexing
from data.files import Files, is_local
from data.sources.formats import FORMATS
from data.sources.index import MEASURED
from data.sources.indexed import files_of, index_folder

TEXTS = flags.DEFINE_list("texts", [], "Fields that hold captions; the usual ones of the kind if not given.")
COLUMNS = flags.DEFINE_list("columns", [], "Other fields to keep, for filters: numbers, truth values, texts.")
IMAGE_KEY = flags.DEFINE_string("image_key", "", "Field of the picture, where a sample has several.")
JOIN = flags.DEFINE_list("join", [], "Tables of further captions of the samples, such as those that a model wrote.")
JOIN_KEY = flags.DEFINE_string("join_key", "key", "Column of these tables, and of the index, that names the sample.")
OUTPUT = flags.DEFINE_string("output", "", "Folder of the index; beside the files if not given.")
PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "Processes that read files.", lower_bound=1)
SCHEDULER = flags.DEFINE_string("scheduler", "", "Address of a Dask scheduler whose workers read the files instead.")
SKIP_DAMAGED = flags.DEFINE_bool("skip_damaged", False, "Leave out damaged files, which the index then names.")


def main(*names: str) -> None:
  if len(names) != 1:
    found = "none" if not names else f"{len(names)}, such as {names[0]} and {names[1]}"
    raise UserError(f"name one set, in quotes where its name holds braces or stars ({found} named)")
  kind, slash, named = names[0].partition("/")
  if not slash or kind not in FORMATS:
    require_known("set", names[0], [f"{kind}/<files>" for kind in FORMATS])
  wanted = _wanted(kind)
  found = files_of(kind, named, Files())
  folder = paths.folder_to_write("--output", OUTPUT.value) if OUTPUT.value else _beside(named)
  joins = [indexing.Join(paths.typed("--join", table), JOIN_KEY.value) for table in JOIN.value]
  with executors.executor(PROCESSES.value, SCHEDULER.value) as executor:
    built = indexing.build(wanted, found, folder, executor, skip_damaged=SKIP_DAMAGED.value, joins=joins)
  print(f"{built.folder} indexes {built.rows:,} samples of {len(found):,} files.")
  for join, met in zip(joins, built.joined, strict=True):
    print(f"{join.table} has captions of {met:,} of them.")
  for why, count in sorted(built.left_out.items(), key=lambda item: -item[1]):
    print(f"Left out {count:,}: {why}.")


def _wanted(kind: str) -> indexing.Wanted:
  texts = tuple(TEXTS.value) or FORMATS[kind].texts
  for name in (*texts, *COLUMNS.value):
    if name in MEASURED or not name.strip():
      raise UserError(f"the index measures {name!r} itself: leave it out of --columns and --texts")
  twice = next((name for name in COLUMNS.value if name in texts), None)
  if twice:
    raise UserError(f"{twice!r} is in --columns and among the fields of captions: leave it out of one of the two")
  return indexing.Wanted(kind, IMAGE_KEY.value, tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(COLUMNS.value)))


def _beside(named: str) -> Path:
  folder = index_folder(named)
  if not is_local(folder):
    raise UserError(f"an index of {named} is written to a local folder: name it with --output, and copy it there then")
  return paths.folder_to_write("the folder of the index", folder)


if __name__ == "__main__":
  cli.run(main, named=True)
