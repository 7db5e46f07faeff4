"""Goes through everything that a format of pairs has to do, for each of them, and prints a table of what held.

python -m benchmarks.formats [--formats=webdataset,parquet] [--quick]

The same pictures and captions are written by the library of each format (csv, webdataset, tensorboardX's TFRecord
writer, Hugging Face's datasets) and read back. A cell is "yes" where what it names was found equal to what was written,
or to an undisturbed run, bit for bit; anything else ends the command. `--quick` leaves out the training.
"""

import csv
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from configs import common
from contrastive_jax.bad_records import BadRecords
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.schedule.segments import Segment
from data import kinds
from data.files import Files
from data.pipeline import Pipeline
from data.sources import Source
from data.sources.indexed import IndexedSource, index_folder
from tests import runs
from tests.data.in_shards import example, png
from tests.data.toy import WordTokenizer
from tests.flaky_server import FAULTS, FlakyServer

FORMATS = flags.DEFINE_list("formats", [], "The formats, all of them if not given.")
QUICK = flags.DEFINE_bool("quick", False, "Leave out the training.")

COUNT = 48
# The picture that is damaged once the set is written.
BAD = 5
RATE = 0.2
CELLS = ("read", "index", "several captions", "1 -> 2 hosts", "bad record", "remote, 20% faults", "SIGKILL, resumed")


def captions(number: int) -> list[str]:
  return [f"picture {number}", f"number {number}"]


@dataclasses.dataclass(frozen=True)
class Format:
  """How sets of a format are written, and what they are called."""

  write: Callable[[Path], str]
  files: str
  options: dict


def table(folder: Path) -> str:
  for number in range(COUNT):
    (folder / f"{number}.png").write_bytes(png(number))
  with open(folder / "captions.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["image", "title", "alt"])
    rows.writerows([f"{number}.png", *captions(number)] for number in range(COUNT))
  return f"table/{folder}/captions.csv"


def folder_of_pictures(folder: Path) -> str:
  for number in range(COUNT):
    (folder / f"{number:03d}.png").write_bytes(png(number))
    (folder / f"{number:03d}.txt").write_text("\n".join(captions(number)))
  return f"folder/{folder}"


def tars(folder: Path) -> str:
  import webdataset

  with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=20, verbose=0) as writer:
    for number in range(COUNT):
      writer.write({"__key__": f"{number:03d}", "png": png(number), "json": {"captions": captions(number)}})
  return f"webdataset/{folder}/{{000..002}}.tar"


def tfrecords(folder: Path) -> str:
  from tensorboardX.record_writer import RecordWriter

  for shard in range(3):
    writer = RecordWriter(str(folder / f"{shard}.tfrecord"))
    for number in range(shard * 16, shard * 16 + 16):
      writer.write(example(image=png(number), captions=[caption.encode() for caption in captions(number)]))
    writer.close()
  return f"tfrecord/{folder}/{{0..2}}.tfrecord"


def _dataset():
  import datasets

  pictures = [{"bytes": png(number), "path": f"{number}.png"} for number in range(COUNT)]
  features = datasets.Features(image=datasets.Image(), captions=datasets.Sequence(datasets.Value("string")))
  return datasets.Dataset.from_dict(
    {"image": pictures, "captions": [captions(number) for number in range(COUNT)]}, features=features
  )


def parquet(folder: Path) -> str:
  for shard in range(3):
    _dataset().shard(3, shard, contiguous=True).to_parquet(folder / f"{shard}.parquet", batch_size=5)
  return f"parquet/{folder}/{{0..2}}.parquet"


def huggingface(folder: Path) -> str:
  _dataset().save_to_disk(folder, num_shards=3)
  return f"huggingface/{folder}/data-{{00000..00002}}-of-00003.arrow"


WEIGHTED = {"caption_key": {"title": 1.0, "alt": 1.0}}
ALL = {
  "table": Format(table, "*.png", WEIGHTED),
  "folder": Format(folder_of_pictures, "*.png", {}),
  "webdataset": Format(tars, "*.tar", {}),
  "tfrecord": Format(tfrecords, "*.tfrecord", {}),
  "parquet": Format(parquet, "*.parquet", {}),
  "huggingface": Format(huggingface, "*.arrow", {}),
}


def check(held: bool, what: str) -> str:
  if not held:
    raise SystemExit(f"{what} does not hold")
  return "yes"


def opened(name: str, options: dict) -> Source:
  config = common.get_config()
  config.data.sources = {"own": {"name": name, "weight": 1.0, **options}}
  return kinds.open_sources(config, [name])[name]


def number_of(image: np.ndarray) -> int:
  return int(image[0, 0, 0])


def is_whole(source: Source) -> bool:
  """Says whether a source has every picture with its captions."""
  found = {number_of(source[index].image): (source[index].image, source.text(index)) for index in range(len(source))}
  return len(source) == COUNT and all(
    np.array_equal(found[number][0], np.asarray(Image.open(io.BytesIO(png(number)))))
    and sorted(found[number][1].captions) == sorted(captions(number))
    for number in range(COUNT)
  )


def pipeline(name: str, source: Source, hosts: int = 1, host: int = 0, per_image: int = 1) -> Pipeline:
  segments = (Segment(6, 24, ((name, 1),), 8, captions_per_image=per_image),)
  how = {"host_index": host, "host_count": hosts, "bad_records": BadRecords(limit=1.0), "seed": 0, "threads": 0}
  return Pipeline(segments, {name: source}, WordTokenizer(), text_length=16, patch_size=4, **how)


def has_several(name: str, source: Source) -> bool:
  """Says whether each image of a step has both of its captions, and neither is the other's negative."""
  batch = pipeline(name, source, per_image=2).batch(0)
  first, second = batch.text.tokens[::2], batch.text.tokens[1::2]
  groups = batch.keys[:, 0]
  return bool(
    (batch.ids[::2] == batch.ids[1::2]).all()
    and (first != second).any(axis=1).all()
    and np.array_equal(groups[::2], groups[1::2])
  )


def hosts_agree(name: str, source: Source) -> bool:
  """Says whether two hosts have the halves of what one has."""
  for step in range(6):
    halves = [pipeline(name, source, 2, host).batch(step) for host in range(2)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *halves)
    same = jax.tree.map(np.array_equal, together, pipeline(name, source).batch(step))
    if not all(jax.tree.leaves(same)):
      return False
  return True


def damage(folder: Path, files: str) -> None:
  """Changes a byte of a picture where it lies."""
  wanted = png(BAD)[40:60]
  for path in sorted(folder.glob(files)):
    content = path.read_bytes()
    if wanted in content and (len(list(folder.glob(files))) < COUNT or path.stem.lstrip("0") == str(BAD)):
      at = content.index(wanted) + 4
      path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
      return
  raise SystemExit(f"{folder} has no picture to damage")


def bad_record(name: str, source: Source) -> bool:
  """Says whether the damaged picture is refused, and replaced and named where a run meets it."""
  refused = 0
  for index in range(len(source)):
    try:
      refused += number_of(source[index].image) == BAD
    except DecodeError:
      refused += 1
  run = pipeline(name, source)
  for step in range(2):
    run.batch(step)
  return refused == 1 and run.substituted == 1


def remote(name: str, folder: Path, options: dict) -> str:
  """Reads the set from a server that fails; returns what came of it."""
  kind, _, named = name.partition("/")
  contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  with FlakyServer(contents, FAULTS, rate=RATE, seed=0) as server, tempfile.TemporaryDirectory() as cache:
    address = server.address(named.removeprefix(f"{folder}/"))
    # A format that is read in a few large pieces may have to be read again before one of them fails.
    for _ in range(10):
      reader = Files(cache_dir=cache, answer_seconds=0.5, delays=(0.02,) * 12)
      check(is_whole(IndexedSource(kind, address, **options, reader=reader)), f"{name} on a server")
      if faults := sum(server.failed.values()):
        return f"yes ({faults} faults)"
  sys.exit(f"no answer for {name} failed")


def resumed(name: str, options: dict, folder: Path) -> str:
  """Trains, kills and resumes; returns whether the bits are those of a run that nobody disturbed."""
  source = {"own": {"name": name, "weight": 1.0, **options}}
  flags_of = (f"--config.data.sources={json.dumps(source)}", "--config.total_steps=24", "--config.batch_size=16")
  runs.train(folder / "whole", *flags_of)
  process = runs.start("train.py", runs.TINY, f"--workdir={folder / 'killed'}", *flags_of)
  while not (folder / "killed" / "checkpoints" / "8").exists() and process.poll() is None:
    time.sleep(0.05)
  process.kill()
  process.communicate()
  runs.train(folder / "killed", *flags_of)
  runs.assert_same_bits(runs.final_state(folder / "whole"), runs.final_state(folder / "killed"))
  same = (folder / "whole" / "sample_ids.jsonl").read_text() == (folder / "killed" / "sample_ids.jsonl").read_text()
  return check(same, f"{name} resumed")


def row(name: str, form: Format) -> list[str]:
  with tempfile.TemporaryDirectory() as place:
    folder = Path(place) / "set"
    folder.mkdir()
    called = form.write(folder)
    kind, _, named = called.partition("/")
    index = "needs none"
    if kind not in ("table", "folder"):
      begun = time.perf_counter()
      subprocess.run([sys.executable, "-m", "data.index", called, "--processes=1"], check=True, capture_output=True)
      index = check(Path(index_folder(named)).is_dir(), "index") + f" ({time.perf_counter() - begun:.0f} s)"
    source = opened(called, form.options)
    cells = [check(is_whole(source), f"{name}: read"), index]
    cells.append(check(has_several(called, source), f"{name}: several captions"))
    cells.append(check(hosts_agree(called, source), f"{name}: hosts"))
    trained = "not run" if QUICK.value else resumed(called, form.options, Path(place))
    away = "no: data.convert first" if index == "needs none" else remote(called, folder, form.options)
    damage(folder, form.files)
    cells.append(check(bad_record(called, opened(called, form.options)), f"{name}: bad record"))
    return [name, *cells, away, trained]


def main(_) -> None:
  chosen = FORMATS.value or list(ALL)
  print("| " + " | ".join(("format", *CELLS)) + " |")
  print("|" + "---|" * (len(CELLS) + 1))
  for name in chosen:
    print("| " + " | ".join(row(name, ALL[name])) + " |", flush=True)


if __name__ == "__main__":
  app.run(main)
