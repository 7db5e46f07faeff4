"""Reads from a server that fails on purpose: what went wrong, how often, what it cost, and that the bytes are right.

python -m benchmarks.flaky_server [--reads=400] [--rate=0.1]

Threads read seeded ranges of three files, once from a server without faults and then once for each kind of fault, and
for all of them together. A figure is of one pass; the delays are those that training has, and a server that stalls is
given up after --answer_seconds. The bytes of each pass are compared with those of the undisturbed one by their hash.
"""

import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import app, flags

from data.files import Files
from tests.flaky_server import FAULTS, FlakyServer

_READS = flags.DEFINE_integer("reads", 400, "Ranges that are read in each pass.", lower_bound=1)
_RATE = flags.DEFINE_float("rate", 0.1, "Share of answers with a fault.", lower_bound=0, upper_bound=1)
_THREADS = flags.DEFINE_integer("threads", 16, "Threads that read.", lower_bound=1)
_SECONDS = flags.DEFINE_float("answer_seconds", 1.0, "Seconds that the server may take for an answer.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the files, the ranges and the faults.")
_COUNTS = ("requests", "bytes")


def reads(server: FlakyServer) -> list[tuple[str, int, int]]:
  """Returns (address, offset, size) of what is read: ranges of the sizes that pictures have."""
  rng, names = np.random.default_rng(_SEED.value), sorted(server.files)
  chosen = []
  for _ in range(_READS.value):
    name, size = names[rng.integers(len(names))], int(rng.integers(1, 200_000))
    chosen.append((server.address(name), int(rng.integers(0, len(server.files[name]) - size)), size))
  return chosen


def read_all(contents: dict[str, bytes], faults: tuple[str, ...]) -> tuple[str, int, Files, float]:
  """Returns the hash of all bytes, the number of faults in the answers, the reader and the seconds of a pass."""
  with FlakyServer(contents, faults, _RATE.value, _SEED.value) as server, ThreadPoolExecutor(_THREADS.value) as pool:
    files, started = Files(answer_seconds=_SECONDS.value), time.perf_counter()
    found = list(pool.map(lambda each: files.read(*each), reads(server)))
    seconds = time.perf_counter() - started
    return hashlib.sha256(b"".join(found)).hexdigest(), sum(server.failed.values()), files, seconds


def main(_: list[str]) -> None:
  """Prints a table, and ends with 1 where bytes differ."""
  rng = np.random.default_rng(_SEED.value)
  contents = {f"{k}.tar": rng.bytes(4 << 20) for k in range(3)}
  read_all(contents, ())  # What is imported and connected first is not timed.
  expected, _, _, undisturbed = read_all(contents, ())
  print(f"{_READS.value} reads by {_THREADS.value} threads without faults: {undisturbed:.2f} s")
  print(f"{'fault':16} {'injected':>8} {'asked again':>11} {'seconds':>8}  {'bytes':9} met as")
  wrong = 0
  for fault in (*FAULTS, "all"):
    digest, injected, files, seconds = read_all(contents, FAULTS if fault == "all" else (fault,))
    tally = files.tally.total()
    met = ", ".join(f"{kind} {count}" for kind, count in tally.most_common() if kind not in _COUNTS)
    wrong += digest != expected
    same = "equal" if digest == expected else "DIFFERENT"
    print(f"{fault:16} {injected:8} {tally['requests'] - _READS.value:11} {seconds:8.2f}  {same:9} {met}", flush=True)
  sys.exit(bool(wrong))


if __name__ == "__main__":
  app.run(main)
