"""Measures how much memory a single record takes at its peak, on every path that reads records.

  python -m benchmarks.record_memory                 # all kinds of records
  python -m benchmarks.record_memory --kinds=TIFF    # those in whose name this regular expression is found

Of each kind of file one is made that is as large as the decoder still reads. A fresh process reads it by every path,
after a small one of its kind: what the table gives is the peak of the process above what it held before. A
table in Markdown is printed, and the command fails where a record takes more than `LIMIT`.
"""

import multiprocessing
import re
import sys
import tempfile
from pathlib import Path

from absl import flags
from PIL import Image

from benchmarks import large_records, record_paths
from contrastive_jax import cli
from contrastive_jax.preprocess.decoding import MAX_BYTES, MAX_FILE_BYTES

# Megabytes that a single record may take.
LIMIT = 300
# Pixels of the first try, also of moving pictures, and of the small one that every process reads first.
_FIRST, _FIRST_MOVING, _SMALL = 45_000_000, 7_000_000, 4096


def measure(ways: list[str], small: Path, large: Path, moving: bool) -> list[tuple[float, str]]:
  """Reads a record by some paths in a process of its own.

  Returns:
    For each path the megabytes that it took, and why it was refused; "" if it was not.
  """
  # What the server has imported, every process has from the start; it has started no backend.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([record_paths.__name__])
  mine, theirs = context.Pipe(duplex=False)
  process = context.Process(target=record_paths.report, args=(ways, small, large, moving, theirs))
  process.start()
  theirs.close()
  try:
    return mine.recv()
  except EOFError:
    raise RuntimeError(f"the process that read {large} died") from None
  finally:
    process.join()


def _size(kind: str, folder: Path) -> tuple[Path, Path, int]:
  """Returns a small and the largest file of a kind that is read, and its number of pixels."""
  moving = kind in large_records.MOVING
  make = (large_records.MOVING if moving else large_records.PICTURES)[kind]
  small, large = folder / "small", folder / "large"
  small.write_bytes(make(_SMALL))
  count = _FIRST_MOVING if moving else _FIRST
  for _ in range(6):
    large.write_bytes(make(count))
    _, refused = measure(["resize" if moving else "decode"], small, large, moving)[0]
    needed, limit = re.search(r"would take ([\d,]+) MB", refused), MAX_BYTES
    if needed is None:
      needed, limit = re.search(r"a file of ([\d,]+) MB", refused), MAX_FILE_BYTES
    if needed is None:  # It is read, or refused in every size.
      break
    count = int(count * min(0.995, 0.99 * limit / 1e6 / float(needed[1].replace(",", ""))))
  if not moving:
    with Image.open(large) as image:  # Icons are never as large as one likes.
      count = image.width * image.height
  return small, large, count


def record(kind: str, ways: list[str]) -> tuple[int, list[tuple[float, str]]]:
  """Measures a kind of record by some paths.

  Returns:
    The number of pixels of the largest file that is read, 0 for one that lies about them, and what `measure` returns.
  """
  with tempfile.TemporaryDirectory() as scratch:
    if kind in large_records.LIES:
      small, large, count = Path(scratch) / "small", Path(scratch) / "large", 0
      small.write_bytes(large_records.PICTURES["PNG RGB"](_SMALL))
      large.write_bytes(large_records.LIES[kind](0))
    else:
      small, large, count = _size(kind, Path(scratch))
    return count, measure(ways, small, large, kind in large_records.MOVING)


def main() -> None:
  words = flags.FLAGS.kinds
  ways = [way for way in record_paths.PATHS if not flags.FLAGS.paths or way in flags.FLAGS.paths]
  print("| record | megapixels | " + " | ".join(ways) + " |")
  print("|---" * (len(ways) + 2) + "|", flush=True)
  worst = 0.0
  for kind in (*large_records.PICTURES, *large_records.MOVING, *large_records.LIES):
    if not re.search(words, kind, re.IGNORECASE):
      continue
    count, found = record(kind, ways)
    worst = max(worst, *(megabytes for megabytes, _ in found))
    row = [f"{megabytes:.0f}" + (" refused" if refused else "") for megabytes, refused in found]
    print(f"| {kind} | {count / 1e6:.1f} | " + " | ".join(row) + " |", flush=True)
  print(f"\nThe most that one record took is {worst:.0f} MB.")
  if worst > LIMIT:
    sys.exit(f"that is more than {LIMIT} MB")


if __name__ == "__main__":
  # Not above, since the processes that measure import this module too.
  flags.DEFINE_string("kinds", "", "Only the kinds in whose name this regular expression is found.")
  flags.DEFINE_list("paths", [], f"Only these of {', '.join(record_paths.PATHS)}.")
  cli.run(main)
