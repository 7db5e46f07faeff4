"""How full rows are, and what that costs: packing next to padding to the maximum and to NaFlex's lengths.

  python -m benchmarks.packing                                   # tables; under a minute
  python -m benchmarks.packing --picture=docs/packed_batch.png   # a real packed batch, drawn

Images have log-normal sides and aspects. "shrunk" is the share of images that lost something to fit, "factor" the mean,
over these, of their sides relative to what they asked for, "dropped" the share of all pixels that is lost on the way.
"scores" is the number of attention scores computed over those needed, where attention computes whole rows;
"ms" is processor time of a plan.
"""

import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from PIL import Image

from contrastive_jax.evaluation import packed_picture
from contrastive_jax.preprocess import packing
from contrastive_jax.preprocess.native import fit, fit_to_length, patchify_clip
from data import emoji
from data.augment import DRAWS, Augment

_PATCHES = flags.DEFINE_list("patches", ["14", "16"], "Sides of a patch in pixels.")
_CAP = flags.DEFINE_integer("max_tokens", 1024, "Most tokens of an image.")
_MEDIAN = flags.DEFINE_float("median", 400.0, "Median side in pixels.")
_SIGMA = flags.DEFINE_float("sigma", 0.6, "Standard deviation of the logarithm of the side.")
_ASPECT = flags.DEFINE_float("aspect_sigma", 0.3, "Standard deviation of the logarithm of width over height.")
_FILL = flags.DEFINE_float("fill", 0.95, "Share of real tokens that the number of rows aims at.")
_PACKS = flags.DEFINE_integer("packs", 500, "Packs of 256 pairs, and as many of 64 and of 32.")
_PICTURE = flags.DEFINE_string("picture", "", "Where to draw a packed batch, as a PNG; prints no tables.")

_NAFLEX = (128, 256, 576, 784, 1024)
_BUCKET = 64
_HEADER = f"{'':36}{'rows':>6}{'fill':>8}{'shrunk':>9}{'factor':>8}{'dropped':>9}{'scores':>8}{'ms':>7}"


def image_sizes(rng: np.random.Generator, count: int) -> np.ndarray:
  """Heights and widths in pixels."""
  side = _MEDIAN.value * np.exp(_SIGMA.value * rng.standard_normal(count))
  aspect = np.exp(_ASPECT.value * rng.standard_normal(count))
  return np.maximum(1, np.round(np.stack([side / np.sqrt(aspect), side * np.sqrt(aspect)], axis=1))).astype(int)


def native_grids(sizes: np.ndarray, patch: int) -> np.ndarray:
  """Patches along (t, y, x) of each image at native resolution."""
  fitted = [fit(height, width, patch=patch, max_tokens=_CAP.value) for height, width in sizes.tolist()]
  return np.array([(1, height // patch, width // patch) for height, width in fitted])


def print_packed(title: str, packs: Sequence[np.ndarray], rows: int, length: int) -> None:
  """Prints one line: what packing does to packs of grids."""
  plans, milliseconds = [], []
  for grids in packs:
    started = time.process_time()
    plans.append(packing.pack_grids(grids, rows=rows, length=length))
    milliseconds.append(1e3 * (time.process_time() - started))
  factors = np.concatenate([plan.factors for plan in plans])
  changed = np.concatenate([(plan.grids != plan.wanted).any(axis=1) for plan in plans])
  asked = sum(int(plan.wanted.prod(axis=1).sum()) for plan in plans)
  needed = sum(float((plan.sizes**2).sum()) for plan in plans)
  print_line(
    title,
    rows,
    float(np.mean([plan.fill for plan in plans])),
    float(changed.mean()),
    float(factors[changed].mean()) if changed.any() else 1.0,
    sum(plan.dropped for plan in plans) / asked,
    len(plans) * rows * length**2 / needed,
    f"{np.mean(milliseconds):7.1f}",
  )


def print_padded(title: str, pairs: int, wanted: np.ndarray, got: np.ndarray, lengths: np.ndarray) -> None:
  """One line: rows of one image each, of which `lengths` are computed."""
  less = got < wanted
  factor = float(np.sqrt(got[less] / wanted[less]).mean()) if less.any() else 1.0
  dropped = float(np.maximum(wanted - got, 0).sum() / wanted.sum())
  scores = float((lengths.astype(float) ** 2).sum() / (got.astype(float) ** 2).sum())
  print_line(title, pairs, float(got.sum() / lengths.sum()), float(less.mean()), factor, dropped, scores, "")


def print_line(title: str, rows: int, fill: float, less: float, factor: float, dropped: float, scores: float, ms: str):
  """Prints a line of the table of images."""
  line = f"  {title:34}{rows:6}{fill:8.1%}{less:9.2%}{factor:8.4f}{dropped:9.2%}{scores:8.2f}{ms}"
  print(line, flush=True)


def images_table(patch: int) -> None:
  """Prints fill, shrinking and lost pixels for one patch size."""
  rng = np.random.default_rng(0)
  sample = native_grids(image_sizes(rng, 20_000), patch)
  tokens = sample.prod(axis=1)
  mean, std = float(tokens.mean()), float(tokens.std())
  print(f"\nImages, patch {patch}: {mean:.0f} +- {std:.0f} tokens of at most {_CAP.value}\n{_HEADER}")
  for pairs in (32, 64, 256):
    count = _PACKS.value
    sizes = image_sizes(rng, pairs * count)
    grids = native_grids(sizes, patch)
    packs = np.split(grids, count)
    enough = packing.capacity(mean, std, pairs=pairs, fill=_FILL.value)
    print(f" packs of {pairs} pairs, {count} of them")
    shapes = [packing.row_shape(enough, least=times * _CAP.value) for times in (4, 8)]
    for rows, length in [(enough // (2 * _CAP.value), 2 * _CAP.value), *shapes]:
      print_packed(f"packed, rows of {length}", packs, rows, length)
    want = grids.prod(axis=1)
    print_padded(f"padded to {_CAP.value}", pairs, want, want, np.full_like(want, _CAP.value))
    print_padded(f"own rows, buckets of {_BUCKET}", pairs, want, want, -(-want // _BUCKET) * _BUCKET)
    drawn = np.repeat(rng.choice(_NAFLEX, count), pairs)
    fitted = [fit_to_length(*size, patch=patch, length=int(n)) for size, n in zip(sizes.tolist(), drawn, strict=True)]
    print_padded("NaFlex, one of its lengths a batch", pairs, want, np.prod(fitted, axis=1) // patch**2, drawn)


def captions_table() -> None:
  """Captions of 11 to 20 tokens, packed and padded."""
  rng = np.random.default_rng(0)
  padded, shortest, longest = 64, 11, 20
  mean, std = (shortest + longest) / 2, float(np.std(np.arange(shortest, longest + 1)))
  print(f"\nCaptions of {shortest} to {longest} tokens\n{'':36}{'rows':>6}{'fill':>8}{'cut':>9}{'dropped':>9}{'ms':>7}")
  for pairs in (32, 64, 256):
    enough = packing.capacity(mean, std, pairs=pairs, fill=0.98)
    print(f" packs of {pairs} pairs\n  {f'padded to {padded}':34}{pairs:6}{mean / padded:8.1%}")
    for least in (64, 128):
      rows, length = packing.row_shape(enough, least=least, multiple=8)
      plans, milliseconds = [], []
      for _ in range(_PACKS.value):
        lengths = rng.integers(shortest, longest + 1, pairs)
        started = time.process_time()
        plans.append(packing.pack_texts(lengths, rows=rows, length=length))
        milliseconds.append(1e3 * (time.process_time() - started))
      fill = np.mean([plan.fill for plan in plans])
      cut = np.mean([plan.truncated / pairs for plan in plans])
      dropped = sum(plan.dropped for plan in plans) / sum(int(plan.wanted.sum()) for plan in plans)
      title = f"packed, rows of {length}"
      print(f"  {title:34}{rows:6}{fill:8.1%}{cut:9.2%}{dropped:9.2%}{np.mean(milliseconds):7.1f}", flush=True)


def drawn_batch(patch: int = 8, pairs: int = 26, length: int = 256) -> tuple[packing.PackedGrids, list]:
  """Returns plan and patches of a pack of strips, each of one to four emoji of many sizes in a row or a column."""
  rng = np.random.default_rng(11)
  source = emoji.training_sources()["twemoji"]
  plain = Augment()
  strips, grids = [], []
  for _ in range(pairs):
    count, across = int(rng.choice(4, p=[0.35, 0.3, 0.2, 0.15])) + 1, bool(rng.random() < 0.65)
    side = int(np.clip(40 * np.exp(0.35 * rng.standard_normal()), 24, 80))
    drawings = [source[int(rng.integers(len(source)))].image for _ in range(count if across else min(count, 3))]
    tiles = plain(drawings, [False] * len(drawings), side, np.full((len(drawings), DRAWS), 0.5))
    strip = np.concatenate(list(tiles), axis=1 if across else 0)
    # Opaque, but a drawing: shown whole.
    strips.append(np.dstack([strip, np.full(strip.shape[:2], 255, np.uint8)]))
    size = fit(*strip.shape[:2], patch=patch, min_tokens=9, max_tokens=100)
    grids.append((1, size[0] // patch, size[1] // patch))
  rows = -(-int(np.prod(grids, axis=1).sum()) // length)
  packed = packing.pack_grids(np.array(grids), rows=rows, length=length)
  sizes = [(int(y) * patch, int(x) * patch) for _, y, x in packed.grids]
  views = plain(strips, [False] * pairs, sizes, np.full((pairs, DRAWS), 0.5))
  return packed, [patchify_clip(view[None], patch, 1) for view in views]


def main(_: list[str]) -> None:
  """Prints tables, or draws."""
  if _PICTURE.value:
    packed, patches = drawn_batch()
    credit = "Twemoji by Twitter, Inc. and other contributors (CC-BY-4.0)"
    picture = packed_picture.draw(packing.place_images(patches, packed), patch_size=8, credit=credit)
    # 256 colours: a third of the bytes, and nobody sees it.
    Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE).save(_PICTURE.value, optimize=True)
    print(f"{_PICTURE.value}: {len(patches)} images in {packed.rows} rows of {packed.length} tokens")
    return
  for patch in map(int, _PATCHES.value):
    images_table(patch)
  captions_table()


if __name__ == "__main__":
  app.run(main)
