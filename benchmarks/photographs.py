"""Photographs for the benchmarks of the data side: windows of scikit-learn's two, with captions."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 375, 500
SIDE, BATCH = 224, 256
# The random resized crop of all contestants, as `data.augment.PHOTOGRAPHS` has it.
ZOOM, STRETCH, FLIP = (1.0, 1.41), 0.25, 0.5
TEXT_LENGTH = 64
TOKENIZER = "tokenizer"
_QUALITY = 90
_WORDS = 600


class Crop(NamedTuple):
  """A crop in whole pixels of the picture, and whether it is mirrored."""

  top: int
  left: int
  height: int
  width: int
  mirrored: bool


def sample_photographs() -> list[np.ndarray]:
  """Returns two photographs, uint8 `[427, 640, 3]`."""
  from sklearn.datasets import load_sample_images  # Needed to make the pictures, not to read them.

  return load_sample_images().images


def captions(count: int, rng: np.random.Generator) -> list[str]:
  """Returns captions of made-up words, about 50 characters each."""
  letters = np.array(list("etaoinshrdlu"))
  words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(_WORDS)]
  return [" ".join(words[k] for k in rng.integers(0, _WORDS, rng.integers(6, 12))) for _ in range(count)]


def write(folder: Path, count: int) -> list[str]:
  """Writes `00000.jpg` with `00000.txt` and so on, and returns the captions."""
  rng, photographs = np.random.default_rng(0), sample_photographs()
  said = captions(count, rng)
  folder.mkdir(parents=True)
  for number, caption in enumerate(said):
    whole = photographs[number % len(photographs)]
    top, left = (
      int(rng.integers(0, have - want + 1)) for have, want in zip(whole.shape, (HEIGHT, WIDTH), strict=False)
    )
    window = whole[top : top + HEIGHT, left : left + WIDTH]
    file = io.BytesIO()
    Image.fromarray(window[:, ::-1] if rng.random() < 0.5 else window).save(file, "JPEG", quality=_QUALITY)
    (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())
    (folder / f"{number:05d}.txt").write_text(caption)
  return said


def read(folder: Path) -> list[tuple[bytes, str]]:
  """Returns the bytes and the caption of each picture."""
  return [(path.read_bytes(), path.with_suffix(".txt").read_text()) for path in sorted(folder.glob("*.jpg"))]


def crop(height: int, width: int, draws: np.ndarray) -> Crop:
  """Returns the crop for five uniform draws in [0, 1): the law of `data.augment.PHOTOGRAPHS`."""
  scale = max(SIDE / height, SIDE / width) * (ZOOM[0] + (ZOOM[1] - ZOOM[0]) * draws[0])
  stretch = np.exp(STRETCH * (draws[1] - 0.5))
  tall, wide = min(height, round(SIDE / scale * stretch)), min(width, round(SIDE / scale / stretch))
  return Crop(int((height - tall) * draws[2]), int((width - wide) * draws[3]), tall, wide, bool(draws[4] < FLIP))
