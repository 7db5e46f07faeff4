"""Damages pictures at seeded places and reads them.

python -m benchmarks.fuzz_records [--pictures=20000]

Prints, for each format, how many were read and how many were refused, the slowest, and the peak of the process.
Anything but `DecodeError` ends it with a traceback.
"""

import io
import resource
import time
from collections import Counter

import numpy as np
from absl import flags
from PIL import Image

from contrastive_jax import cli
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF")
_MODES = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"), "AVIF": ("RGB", "RGBA"), "WEBP": ("RGB", "RGBA")}


def damaged(kind: str, rng: np.random.Generator) -> bytes:
  """Returns a small picture with an orientation, damaged in its header, its metadata or its body."""
  height, width = rng.integers(1, 40, 2)
  mode = str(rng.choice(_MODES.get(kind, ("RGB", "RGBA", "L", "P", "1", "LA", "I;16"))))
  levels = rng.integers(0, 256, (height, width, 4), np.uint8)
  image = Image.fromarray(levels)
  image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
  exif = Image.Exif()
  exif[0x0112] = int(rng.integers(0, 12))
  exif[0x010F] = "maker" * int(rng.integers(1, 9))
  file = io.BytesIO()
  image.save(file, kind, **({} if kind == "GIF" else {"exif": exif.tobytes()}))
  data = bytearray(file.getvalue())
  reach = (64, 256, len(data))[rng.integers(3)]
  for _ in range(rng.integers(1, 6)):
    at = int(rng.integers(min(reach, len(data))))
    what = rng.integers(5)
    if what < 3:
      data[at] = (data[at] ^ (1 << int(rng.integers(8))), int(rng.integers(256)), 255)[what]
    elif what == 3:
      data[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(9)))
    elif len(data) > 2:
      del data[max(2, at) :]
  return bytes(data)


def fuzz(pictures: int, seed: int = 0) -> dict[str, Counter]:
  """Reads damaged pictures, and counts by format what was read and what was refused."""
  found = {kind: Counter() for kind in FORMATS}
  for number in range(pictures):
    kind = FORMATS[number % len(FORMATS)]
    data = damaged(kind, np.random.default_rng((seed, number)))
    start = time.perf_counter()
    try:
      pixels = decode(data)
      assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
      found[kind]["read"] += 1
    except DecodeError:
      found[kind]["refused"] += 1
    milliseconds = int(1000 * (time.perf_counter() - start))
    found[kind]["slowest (ms)"] = max(found[kind]["slowest (ms)"], milliseconds)
  return found


def main() -> None:
  for name, counts in fuzz(flags.FLAGS.pictures).items():
    print(name, dict(counts))
  print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


if __name__ == "__main__":
  # Not above, since a test imports this module, and flags are known to the whole process.
  flags.DEFINE_integer("pictures", 20_000, "Number of damaged pictures.", lower_bound=1)
  cli.run(main)
