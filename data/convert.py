"""Writes any set of pictures with captions as tars of webdataset with an index, which are read by offset.

python -m data.convert table/photos/captions.csv OUTPUT
python -m data.convert folder/photos OUTPUT --shard_bytes=1_000_000_000 --processes=8
python -m data.convert 'parquet/photos/*.parquet' OUTPUT --filter='similarity > 0.28' --caption_key=alt
python -m data.convert tfds/coco_captions@train OUTPUT --caption_key=captions --scheduler=tcp://10.0.0.1:8786

Names are those of `config.data.sources`; a set in shards needs its index (`python -m data.index`). The bytes of
pictures stay as they are; pixels without a file become PNG. After an interruption the same command goes on with the
tars that are left. The result is the same whatever the number of processes.
"""

import os

from absl import flags

from contrastive_jax import bad_records, cli, paths
from contrastive_jax.errors import UserError
from data import converting, executors, named

SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 1 << 28, "Bytes of each tar, about.", lower_bound=1)
CHECK = flags.DEFINE_bool("check", True, "Decode each picture, and leave out those that cannot be; else its header.")
PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "Processes that convert.", lower_bound=1)
SCHEDULER = flags.DEFINE_string("scheduler", "", "Address of a Dask scheduler whose workers convert instead.")
flags.adopt_module_key_flags(named)


def main(*names: str) -> None:
  if len(names) != 2:
    raise UserError(f"name a set and a folder, such as table/captions.csv shards ({len(names)} named)")
  name, output = names
  folder = paths.folder_to_write("OUTPUT", output)
  source, asked = named.open_named(name, whole=bool(SCHEDULER.value))
  with executors.executor(PROCESSES.value, SCHEDULER.value) as executor:
    done = converting.convert(source, folder, executor, shard_bytes=SHARD_BYTES.value, check=CHECK.value, asked=asked)
  print(f"{done.name} holds {done.rows:,} samples in {done.shards:,} tars.")
  if done.left_out:
    print(f"Left out {done.left_out:,} that cannot be read, see {folder / bad_records.FILE}.")


if __name__ == "__main__":
  cli.run(main, named=True)
