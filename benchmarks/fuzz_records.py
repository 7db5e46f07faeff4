"""Damages pictures and captions at seeded places and reads them as training, evaluation and embedding do.

  python -m benchmarks.fuzz_records                  # 20,000 pictures and 20,000 caption structures
  python -m benchmarks.fuzz_records --pictures=600 --captions=600

Prints, for each kind, how many records were read and how many refused, the slowest in milliseconds, and how much memory
the process took at its peak. It fails with a traceback for any exception but `DecodeError` and `UserError`, for a
record that takes longer than `TIME_LIMIT`, and where the pipeline, the evaluation and the embedding do not leave out
exactly the records that the decoder refuses.
"""

import dataclasses
import faulthandler
import functools
import io
import json
import logging
import math
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from benchmarks.damaged_pictures import FORMATS, Damaged, damaged
from contrastive_jax import cli, inputs
from contrastive_jax.bad_records import BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import unreadable
from contrastive_jax.inference import Model
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from contrastive_jax.schedule.segments import Segment
from data import embedding_files, listings
from data.pipeline import Pipeline
from data.sources import Example, Text, stable_hash, tfds

# Seconds that one record may take.
TIME_LIMIT = 10
# Records that go through the commands together.
_CHUNK = 1000
_TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "remat": "none"}


def structure(rng: np.random.Generator, depth: int = 0) -> Any:
  """Returns anything that a careless writer may have put in the place of a caption."""
  words = ("a dog", "ein Hund", "犬", "", " ", "\n", "\0", "a\u2028b", "🐕‍🦺", "x" * 500, "\ud800", "1", "nan")
  kinds = 18 if depth < 3 else 14
  kind = int(rng.integers(kinds))
  if kind < 6:
    return words[rng.integers(len(words))]
  if kind < 9:
    return words[rng.integers(len(words))].encode(errors="surrogatepass") + (rng.bytes(3) if kind == 8 else b"")
  if kind < 14:
    return (None, 3, float("nan"), True, np.float32(1))[kind - 9]
  inner = [structure(rng, depth + 1) for _ in range(rng.integers(4))]
  if kind == 14:
    return inner
  if kind == 15:
    return tuple(inner)
  if kind == 16:
    array = np.empty(len(inner), object)
    for k, value in enumerate(inner):
      array[k] = value
    return array
  keys = ("text", "caption", "raw", "lang")[: max(1, len(inner))]
  return dict(zip(keys, inner or [""], strict=False))


class _Timed:
  """Raises `TimeoutError` in the main thread when a record takes too long, and keeps the slowest by kind."""

  def __init__(self):
    self.found: dict[str, Counter] = {}

  def __call__(self, kind: str, read: Callable[[], Any], refusals: tuple[type, ...] = (DecodeError,)) -> Any:
    """Returns what was read; None where it was refused."""
    counts, start, result = self.found.setdefault(kind, Counter()), time.perf_counter(), None
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
      result = read()
      counts["read"] += 1
    except refusals as error:
      assert "\n" not in str(error), f"{kind}: more than one line: {error}"
      counts["refused"] += 1
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
    milliseconds = int(1000 * (time.perf_counter() - start))
    counts["slowest (ms)"] = max(counts["slowest (ms)"], milliseconds)
    return result


def _too_long(*_: Any) -> None:
  raise TimeoutError(f"a record took longer than {TIME_LIMIT} s")


@dataclasses.dataclass
class _Stored:
  """A source, and an evaluation set, of files in memory."""

  files: Sequence[bytes]
  name: str = "damaged"

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int, /) -> Example:
    return Example(decode(self.files[index], background=None), self.text(index), index)

  def text(self, index: int) -> Text:
    return Text((f"picture {index}",), stable_hash(self.name, index))


class Letters:
  """A tokenizer: one token a letter."""

  vocab_size, pad_id, fingerprint = 97, 0, "letters"

  def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
      codes = [1 + ord(letter) % 96 for letter in text[:length]]
      tokens[row, : len(codes)] = codes
    return tokens, tokens > 0


@functools.cache
def small_model() -> Model:
  """Returns the smallest model that embeds pictures and texts."""
  vision = {"image_size": 8, "patch_size": 4, "transformer": _TOWER}
  text = {"vocab_size": 97, "length": 6, "transformer": _TOWER}
  config = presets.resolve("siglip_ti16", {"image": vision, "text": text, "embed_dim": 16})
  params = jax.jit(lambda: dual_encoder.init(config, jax.random.key(0)))()
  return Model(config, params, Letters(), batch_size=64)


def picture(number: int, seed: int = 0) -> Damaged:
  """Returns the damaged picture of a number."""
  return damaged(FORMATS[number % len(FORMATS)], np.random.default_rng((seed, number)))


def fuzz(pictures: int, seed: int = 0) -> dict[str, Counter]:
  """Decodes damaged pictures, and counts by format and damaged part what was read and what was refused."""
  timed = _Timed()
  for number in range(pictures):
    made = picture(number, seed)
    pixels = timed(f"{made.kind} {made.part}", functools.partial(decode, made.data))
    assert pixels is None or (pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3)
    if made.whole is not None:
      assert pixels is not None, f"picture {number} of seed {seed} has whole pixels and is refused"
      # Damage may make an orientation of something else.
      turned = [np.rot90(side, k) for side in (pixels, pixels[:, ::-1]) for k in range(4)]
      assert any(np.array_equal(each, decode(made.whole)) for each in turned), f"picture {number} came out wrong"
  return timed.found


def fuzz_commands(pictures: int, seed: int = 0) -> Counter:
  """Sends damaged pictures through training's pipeline, an evaluation and embed.py's writer.

  Returns:
    How many each of the three left out, which is as many as the decoder refuses.
  """
  total: Counter = Counter()
  stored = io.BytesIO()
  Image.new("RGB", (9, 7), "red").save(stored, "PNG")
  sound = stored.getvalue()
  for start in range(0, pictures, _CHUNK):
    faulthandler.dump_traceback_later(TIME_LIMIT * 60, exit=True)
    made = [picture(number, seed) for number in range(start, min(start + _CHUNK, pictures))]
    files = [each.data for each in made]
    for at in range(0, len(files) + len(files) // 10, 11):
      # One that is sound, so that there is something to stand in for the others; a source without any is an error.
      files.insert(at, sound)
    source, refused = _Stored(files), 0
    for file in files:
      try:
        decode(file)
      except DecodeError:
        refused += 1
    ledger = BadRecords()
    batch_size = math.gcd(len(files), 50)
    segments = (Segment(len(files) // batch_size, batch_size, (("damaged", 1),), 8),)
    options = {"text_length": 8, "patch_size": 4, "seed": 0, "bad_records": ledger}
    pipeline = Pipeline(segments, {"damaged": source}, Letters(), **options)
    for _, batch in pipeline.iterate(0, len(pipeline)):
      assert batch.image.patches.shape == (batch_size, 4, 48)
    # Every record is drawn once; more are met where they stand in for another.
    assert len(ledger._named) == refused == pipeline.substituted, (refused, pipeline.substituted)
    scored = BadRecords()
    images, good = unreadable.embedded(small_model().encode_image, files, "damaged", scored)
    assert np.isfinite(images).all() and scored.count == (~good).sum() == refused, (scored.count, refused)
    with tempfile.TemporaryDirectory() as scratch:
      folder = Path(scratch) / "pictures"
      folder.mkdir()
      for number, file in enumerate(files):
        (folder / f"{number:05}.png").write_bytes(file)  # Decoders go by the content.
      ids, items = listings.images(folder)
      left_out = embedding_files.write(Path(scratch) / "out.npy", small_model(), ids, items)
      embedded = np.load(Path(scratch) / "out.npy")
    assert len(left_out) == refused and len(embedded) == len(files) - refused and np.isfinite(embedded).all()
    print(f"{start + len(made):,} pictures read three ways, peak {peak_megabytes():,.0f} MB", flush=True)
    total.update(damaged=len(made), pipeline=refused, evaluation=scored.count, embedding=len(left_out))
  faulthandler.cancel_dump_traceback_later()
  return total


class _Table(Sequence):
  """Records of one caption feature, as TFDS's readers return them."""

  name = "damaged"

  def __init__(self, values: Sequence[Any]):
    self._values = values

  def __len__(self) -> int:
    return len(self._values)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return {"caption": self._values[index], "image": np.zeros((2, 2, 3), np.uint8)}


def fuzz_captions(captions: int, seed: int = 0) -> dict[str, Counter]:
  """Reads structures as captions of training, of an evaluation, and of the tables that embed.py takes."""
  timed, values = _Timed(), [structure(np.random.default_rng((seed, number))) for number in range(captions)]
  source = tfds.TfdsSource.__new__(tfds.TfdsSource)
  source.name, source.split, source._salt, source._of_class = "damaged", "train", 1, None
  source._records, source._caption_key, source._image_key, source._flip = _Table(values), "caption", "image", False
  kept: list[str] = []
  for index in range(len(values)):
    text = timed("training", functools.partial(source.text, index))
    if text is not None:
      assert text.captions and all(isinstance(said, str) and said.strip() for said in text.captions)
      kept += text.captions
  for start in range(0, len(values), _CHUNK):
    chunk = values[start : start + _CHUNK]
    texts, bad = tfds.captions_of(_Table(chunk), "caption")
    timed.found.setdefault("evaluation", Counter()).update(read=len(chunk) - len(bad), refused=len(bad))
    assert all(texts[k] for k in range(len(chunk)) if k not in bad)
  with tempfile.TemporaryDirectory() as scratch:
    table = Path(scratch) / "texts.jsonl"
    for value in values:
      row = {"text": value if isinstance(value, str | int | float | None) else _as_json(value)}
      table.write_text(json.dumps(row) + "\n", encoding="utf-8")
      said = timed("embedding", functools.partial(listings.texts, table), (UserError,))
      assert said is None or all(isinstance(each, str) for each in said[1])
      timed("encode_text", functools.partial(inputs.texts, value), (UserError,))
  for start in range(0, len(kept), _CHUNK):
    assert np.isfinite(small_model().encode_text(kept[start : start + _CHUNK])).all()
  return timed.found


def _as_json(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _as_json(each) for key, each in value.items()}
  if isinstance(value, list | tuple | np.ndarray):
    return [_as_json(each) for each in value]
  return value if isinstance(value, str | int | float | None) else str(value)


def peak_megabytes() -> float:
  """Returns the most memory that this process has held, in megabytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
      return int(line.split()[1]) / 1e3
  return float("nan")


def main() -> None:
  options = flags.FLAGS
  signal.signal(signal.SIGALRM, _too_long)
  logging.getLogger("contrastive_jax").setLevel(logging.ERROR)  # Every bad record would be named.
  warnings.simplefilter("ignore")
  for read, count in ((fuzz, options.pictures), (fuzz_captions, options.captions)):
    for name, counts in read(count, options.seed).items():
      print(name, dict(counts), flush=True)
  print("left out of the same pictures:", dict(fuzz_commands(options.pictures, options.seed)))
  print(f"peak {peak_megabytes():,.0f} MB")


if __name__ == "__main__":
  # Not above, since a test imports this module, and flags are known to the whole process.
  flags.DEFINE_integer("pictures", 20_000, "Number of damaged pictures.", lower_bound=0)
  flags.DEFINE_integer("captions", 20_000, "Number of structures in the place of captions.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Seed of both.")
  cli.run(main)
