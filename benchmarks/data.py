"""Measures the data side: readers on one core beside others', a step's plan, a large index, memory over many samples.

  python -m benchmarks.data                                  # all sections, about five minutes and 2 GB of disk
  python -m benchmarks.data --sections=throughput --tf_python=DIR/bin/python --streaming_python=DIR/bin/python
  python -m benchmarks.data --sections=plan,index,memory --index_samples=1000000

Readers are processes on the same core that take turns, a few batches each. Figures are medians over the turns, of
processor time, and only ratios of one invocation mean anything. Nothing but ours and Grain's shuffles, and only ours
compares checksums, packs captions, and makes patches and keys.
tf.data and mosaicml-streaming run in a Python that has them, and are left out where none is named.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from absl import flags
from array_record.python import array_record_module

from benchmarks import data_readers, large_index, photographs, turns
from contrastive_jax import cli
from contrastive_jax.errors import require_known
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.schedule.segments import Segment
from data.mixture import drawn

PLANNED = 32_768


def throughput() -> None:
  """Prints the images a second of each reader on one core."""
  core = max(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch or None) as scratch:
    folder = Path(scratch)
    prepare(folder, flags.FLAGS.pictures)
    commands = {name: [sys.executable, "-m", "benchmarks.data_readers", name] for name in data_readers.READERS}
    for name, python, module in (
      ("tf.data, decode_and_crop", flags.FLAGS.tf_python, "data_tf"),
      ("DataLoader + mosaicml-streaming", flags.FLAGS.streaming_python, "data_streaming"),
    ):
      if python:
        commands[name] = [python, "-m", f"benchmarks.{module}"]
    contestants = [turns.Contestant(name, [*command, str(folder)], core) for name, command in commands.items()]
    running = [each for each in contestants if not each.failure]
    for each in contestants:
      if each.failure:
        print(f"{each.name} is left out: {each.failure}")
    rates = np.zeros((len(running), flags.FLAGS.repeats))
    for repeat in range(flags.FLAGS.repeats):
      for number, each in enumerate(running):
        done = each.turn(flags.FLAGS.batches)
        rates[number, repeat] = done.items / done.processor
    for each in contestants:
      each.close()
  size = f"{photographs.WIDTH} x {photographs.HEIGHT}"
  print(f"JPEGs of {size} to {photographs.SIDE} px on one core, medians of {flags.FLAGS.repeats} turns")
  print(f"  {'':32}{'images a second':>17}{'ratio':>7}")
  for each, rate, ratio in zip(running, np.median(rates, axis=1), np.median(rates / rates[0], axis=1), strict=True):
    print(f"  {each.name:32}{rate:17.0f}{ratio:7.2f}")


def prepare(folder: Path, count: int) -> None:
  """Writes the photographs as files with a table, tars with their index, and ArrayRecord; and a tokenizer."""
  said = photographs.write(folder / "photographs", count)
  tokenizers.train_bpe(said, 8192).save(folder / photographs.TOKENIZER)
  rows = [json.dumps({"image": f"{number:05d}.jpg", "caption": caption}) for number, caption in enumerate(said)]
  (folder / "photographs" / "captions.jsonl").write_text("\n".join(rows) + "\n")
  (folder / "tars").mkdir()
  writer = array_record_module.ArrayRecordWriter(str(folder / "photographs.array_record"), "group_size:1")
  with webdataset.ShardWriter(f"{folder}/tars/%03d.tar", maxcount=-(-count // 4), verbose=0) as tars:
    for number, (data, caption) in enumerate(photographs.read(folder / "photographs")):
      tars.write({"__key__": f"{number:05d}", "jpg": data, "txt": caption})
      writer.write(caption.encode() + b"\0" + data)
  writer.close()
  named = f"{folder}/tars/*.tar"
  command = [sys.executable, "-m", "data.index", f"webdataset/{named}", "--processes=1"]
  subprocess.run(command, cwd=turns.ROOT, check=True, capture_output=True)


def plan() -> None:
  """Prints how long it takes to say which samples a step of 32,768 pairs draws."""
  print(f"\nplan of a step of {PLANNED:,} pairs, milliseconds, medians of {10 * flags.FLAGS.repeats}")
  for title, lengths in (
    ("one source of 10^7 samples", {"a": 10**7}),
    ("four sources of 10^6 to 10^9", {"a": 10**6, "b": 10**7, "c": 10**8, "d": 10**9}),
  ):
    weights = tuple((name, 1 + number) for number, name in enumerate(lengths))
    segments = [Segment(100_000, PLANNED, weights, photographs.SIDE)]
    seconds = []
    for step in range(50_000, 50_000 + 10 * flags.FLAGS.repeats):
      started = time.perf_counter(), time.process_time()
      drawn(segments, lengths, 0, step, slice(0, PLANNED))
      seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, processor = (1e3 * statistics.median(each) for each in zip(*seconds, strict=True))
    print(f"  {title:32}{wall:7.1f} of wall time{processor:7.1f} of processor time")


def index() -> None:
  """Prints what opening a large index takes, and how long the first batch."""
  count = flags.FLAGS.index_samples
  with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch or None) as scratch:
    folder = Path(scratch) / "large"
    size = large_index.write(folder, count)
    print(f"\nan index of {count:,} samples, {size / 1e6:,.0f} MB; resident megabytes of the process")
    _table([*probe("opening", folder), *probe("filtered", folder)])
    times, processor = [], []
    for _ in range(flags.FLAGS.repeats):
      started = time.perf_counter()
      found = probe("first_batch", folder)
      times.append(time.perf_counter() - started)
      processor.append(found[-1]["processor"])
    what = f"first batch since the start, {statistics.median(processor):.1f} s of it computing"
    _table([{**found[-1], "what": what, "seconds": statistics.median(times)}])


def memory() -> None:
  """Prints the memory of a process that plans and reads many samples."""
  count = flags.FLAGS.memory_samples
  with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch or None) as scratch:
    folder = Path(scratch) / "large"
    large_index.write(folder, min(count, flags.FLAGS.index_samples))
    print(f"\n{count:,} samples planned, and their captions read; resident megabytes of the process")
    _table(probe("samples", folder, count)[::3])


def probe(name: str, folder: Path, number: int = 0) -> list[dict[str, Any]]:
  """Runs a probe of `large_index` in a process of its own and returns what it found."""
  command = [sys.executable, "-m", "benchmarks.large_index", name, str(folder), str(number)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  return json.loads(subprocess.run(command, cwd=turns.ROOT, env=environment, check=True, capture_output=True).stdout)


def _table(found: Sequence[dict[str, Any]]) -> None:
  print(f"  {'':48}{'seconds':>9}{'all':>7}{'own':>7}{'mapped':>8}")
  for each in found:
    print(
      f"  {each['what']:48}{each['seconds']:9.2f}{each['all']:7.0f}{each['own']:7.0f}{each['mapped']:8.0f}", flush=True
    )


SECTIONS = {each.__name__: each for each in (throughput, plan, index, memory)}


def main() -> None:
  for name in flags.FLAGS.sections:
    require_known("--sections", name, tuple(SECTIONS))
  for name in flags.FLAGS.sections:
    SECTIONS[name]()


if __name__ == "__main__":
  flags.DEFINE_list("sections", list(SECTIONS), "Which sections to run.")
  flags.DEFINE_string("tf_python", "", "A Python that has TensorFlow and tokenizers.")
  flags.DEFINE_string("streaming_python", "", "A Python that has mosaicml-streaming, PyTorch and what is needed here.")
  flags.DEFINE_integer("pictures", 1024, "Photographs of the readers.")
  flags.DEFINE_integer("batches", 4, "Batches of 256 a turn.")
  flags.DEFINE_integer("repeats", 5, "Turns of each reader, and a tenth of the plans.")
  flags.DEFINE_integer("index_samples", 10_000_000, "Samples of the large index.")
  flags.DEFINE_integer("memory_samples", 1_000_000, "Samples that are drawn in one process.")
  flags.DEFINE_string("scratch", "", "Folder for temporary files; the system's if not given.")
  cli.run(main)
