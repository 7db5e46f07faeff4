"""An index of many samples, all of which are one picture, and what opening it costs a process of its own.

`benchmarks.data` writes the index and starts the probes: `python -m benchmarks.large_index PROBE FOLDER [NUMBER]`.
"""

import dataclasses
import io
import json
import os
import re
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from benchmarks import photographs
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.schedule.segments import Segment
from data.indexing import Wanted
from data.mixture import drawn
from data.pipeline import Pipeline
from data.sources import index as layout
from data.sources.indexed import IndexedSource

# Samples whose columns are made at once.
_BLOCK = 1 << 18
_CAPTIONS = 1 << 12
FILTER = "similarity > 0.28"
TEXTS_READ = 10_000
_SMALL = 16


def write(folder: Path, rows: int) -> int:
  """Writes a tar of one small picture and its index, in which that picture stands `rows` times; returns its bytes."""
  folder.mkdir(parents=True)
  file = io.BytesIO()
  Image.fromarray(np.full((_SMALL, _SMALL, 3), 99, np.uint8)).save(file, "JPEG")
  picture, tar = file.getvalue(), folder / "all.tar"
  with tarfile.open(tar, "w") as archive:
    member = tarfile.TarInfo("0.jpg")
    member.size = len(picture)
    archive.addfile(member, io.BytesIO(picture))
  with tarfile.open(tar) as archive:
    (member,) = archive
  rng = np.random.default_rng(0)
  said = pa.array(photographs.captions(_CAPTIONS, rng), pa.large_string())
  schema = pa.schema([*layout.MEASURED.items(), ("txt", layout.TEXTS), ("similarity", pa.float64())])
  writer = layout.Writer(folder / "all.tar.index", schema)
  same = {"offset": member.offset_data, "size": len(picture), "crc": zlib.crc32(picture)}
  same |= {"width": _SMALL, "height": _SMALL, "channels": 0}
  for start in range(0, rows, _BLOCK):
    count = min(_BLOCK, rows - start)
    numbers = pc.cast(pa.array(np.arange(start, start + count)), pa.large_string())
    texts = said.take(pa.array(rng.integers(0, _CAPTIONS, count)))
    columns = {name: pa.array(np.full(count, value), schema.field(name).type) for name, value in same.items()}
    columns["key"] = pc.utf8_lpad(numbers, width=9, padding="0")
    columns["draw"] = pa.array(rng.integers(0, 1000, count), pa.int16())
    columns["txt"] = pa.LargeListArray.from_arrays(pa.array(np.arange(count + 1)), texts)
    columns["similarity"] = pa.array(rng.normal(0.28, 0.04, count))
    writer.append(pa.table({name: columns[name] for name in schema.names}, schema))
  wanted = Wanted("webdataset", texts=("txt",), columns=("similarity",))
  writer.close(
    wanted=dataclasses.asdict(wanted),
    texts=wanted.texts,
    columns=wanted.columns,
    files=[layout.IndexedFile("../all.tar", tar.stat().st_size, "", rows, {})],
    damaged={},
  )
  tokenizers.train_bpe(said.slice(0, 2000).to_pylist(), 8192).save(folder / photographs.TOKENIZER)
  return sum(part.stat().st_size for part in (folder / "all.tar.index").iterdir())


def memory() -> dict[str, float]:
  """Returns the resident megabytes of this process: all, those of its own, and those of mapped files."""
  told = dict(re.findall(r"^(VmRSS|RssAnon|RssFile):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
  return {"all": int(told["VmRSS"]) / 1024, "own": int(told["RssAnon"]) / 1024, "mapped": int(told["RssFile"]) / 1024}


def opening(folder: Path, _: int) -> list[dict[str, Any]]:
  """Opens the set, as it is and with a filter, then reads texts; returns seconds and memory after each."""
  found = [{"what": "imports alone", "seconds": 0.0, **memory()}]

  def timed(what: str, act: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = act()
    found.append({"what": what, "seconds": time.perf_counter() - started, **memory()})
    return result

  source = timed("opened", lambda: _source(folder))
  chosen = np.random.default_rng(0).integers(0, len(source), TEXTS_READ).tolist()
  timed(f"{TEXTS_READ:,} texts read", lambda: [source.text(k) for k in chosen])
  del source
  timed("opened with a filter", lambda: _source(folder, filter=FILTER))
  return found


def filtered(folder: Path, _: int) -> list[dict[str, Any]]:
  """Opens the set with a filter, in a process that has opened nothing else."""
  started = time.perf_counter()
  source = _source(folder, filter=FILTER)
  seconds = time.perf_counter() - started
  return [{"what": f"opened with a filter, keeps {len(source):,}", "seconds": seconds, **memory()}]


def first_batch(folder: Path, _: int) -> list[dict[str, Any]]:
  """Makes the first batch of 256 pairs; who starts this process takes the wall time."""
  source = _source(folder)
  segment = Segment(1 << 20, photographs.BATCH, ((source.name, 1),), _SMALL)
  tokenizer = tokenizers.load(folder / photographs.TOKENIZER)
  how = {"text_length": photographs.TEXT_LENGTH, "patch_size": _SMALL, "seed": 0}
  Pipeline([segment], {source.name: source}, tokenizer, **how).batch(0)
  return [{"processor": time.process_time(), **memory()}]


def samples(folder: Path, count: int) -> list[dict[str, Any]]:
  """Plans and reads `count` samples without their pictures, and returns the memory after each tenth of them."""
  source = _source(folder)
  segment = Segment(1 << 20, photographs.BATCH, ((source.name, 1),), _SMALL)
  found, started = [], time.perf_counter()
  for tenth in range(10):
    for step in range(tenth * count // 10 // photographs.BATCH, (tenth + 1) * count // 10 // photographs.BATCH):
      plan = drawn([segment], {source.name: len(source)}, 0, step, slice(0, photographs.BATCH))
      for k in plan.index.tolist():
        source.text(k)
    seconds = time.perf_counter() - started
    found.append({"what": f"{(tenth + 1) * count // 10:,} samples", "seconds": seconds, **memory()})
  return found


def _source(folder: Path, **options: str) -> IndexedSource:
  return IndexedSource("webdataset", f"{folder}/all.tar", **options)


PROBES = {each.__name__: each for each in (opening, filtered, first_batch, samples)}

if __name__ == "__main__":
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  print(json.dumps(PROBES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))), file=answers, flush=True)
