"""One reader of the photographs of `benchmarks.data`, ours or another's, which takes turns with the others.

`benchmarks.data` starts it: `python -m benchmarks.data_readers NAME FOLDER`, where the folder holds the photographs in
all formats. Each decodes, crops, resizes and mirrors pictures, tokenises their captions, and makes batches of uint8.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from benchmarks import photographs, turns
from contrastive_jax.preprocess import packing, tokenizers
from contrastive_jax.schedule.segments import Rows, Segment
from data.augment import Augment
from data.pipeline import Pipeline
from data.sources import Source
from data.sources.indexed import IndexedSource
from data.sources.table import TableSource

_SIDE, _BATCH, _LENGTH = photographs.SIDE, photographs.BATCH, photographs.TEXT_LENGTH
_PACK = 64
Work = Callable[[int], int]


def plain_view(data: bytes, draws: np.ndarray) -> np.ndarray:
  """Returns the view `[224, 224, 3]` of a JPEG that OpenCV decodes, crops and resizes, without any check."""
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
  top, left, height, width, mirrored = photographs.crop(*image.shape[:2], draws)
  view = cv2.resize(image[top : top + height, left : left + width], (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
  return view[:, ::-1] if mirrored else view


def ours(source: Source, folder: Path, **options: int) -> Work:
  """Returns the pipeline of a run over one source; it shuffles, packs captions, and makes patches and keys."""
  tokenizer = tokenizers.load(folder / photographs.TOKENIZER)
  counts = tokenizer([source.text(k).captions[0] for k in range(len(source))], _LENGTH)[1].sum(axis=1)
  tokens = packing.capacity(float(counts.mean()), float(counts.std()), pairs=_PACK, fill=0.95)
  rows = Rows(*packing.row_shape(tokens, least=_LENGTH, multiple=8))
  segment = Segment(1 << 20, _BATCH, ((source.name, 1),), _SIDE, pack_pairs=_PACK, text_rows=rows)
  augment = Augment(zoom=photographs.ZOOM, stretch=photographs.STRETCH, flip=photographs.FLIP)
  sources = {source.name: source}
  how = {"text_length": _LENGTH, "patch_size": 16, "seed": 0, "augment": augment, **options}
  pipeline = Pipeline([segment], sources, tokenizer, **how)
  step = 0

  def work(batches: int) -> int:
    nonlocal step
    step += batches
    # Captions that come again are not tokenised again, and in a large set none comes again soon.
    pipeline._tokens.clear()
    return sum(len(batch.ids) for _, batch in pipeline.iterate(step - batches, step))

  return work


def webdataset_by_offset(folder: Path) -> Work:
  """Returns ours over tars, in which the index finds every picture."""
  return ours(IndexedSource("webdataset", f"{folder}/tars/*.tar"), folder, threads=1)


def loose_files(folder: Path) -> Work:
  """Returns ours over a table of files."""
  return ours(TableSource(f"{folder}/photographs/captions.jsonl"), folder, threads=1)


def grain_function(folder: Path) -> Work:
  """Returns a Grain pipeline of one plain function over ArrayRecord."""
  import grain

  records = grain.sources.ArrayRecordDataSource([str(folder / "photographs.array_record")])

  def view(record: bytes, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    caption, _, data = record.partition(b"\0")
    return plain_view(data, rng.random(5)), caption.decode()

  dataset = grain.MapDataset.source(records).seed(0).shuffle().repeat().random_map(view)
  return _plain(iter(dataset), folder)


def torch_webdataset(folder: Path) -> Work:
  """Returns webdataset, which streams the tars, behind PyTorch's DataLoader, with OpenCV for the pictures."""
  return _loader(folder, plain_view)


def torch_webdataset_pil(folder: Path) -> Work:
  """Returns the same with Pillow for the pictures, as torchvision does it."""
  import io

  from PIL import Image

  def view(data: bytes, draws: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
      image = opened.convert("RGB")
    top, left, height, width, mirrored = photographs.crop(image.height, image.width, draws)
    box = (left, top, left + width, top + height)
    pixels = image.crop(box).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return np.asarray(pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else pixels)

  return _loader(folder, view)


def _loader(folder: Path, view: Callable[[bytes, np.ndarray], np.ndarray]) -> Work:
  import torch
  import webdataset

  torch.set_num_threads(1)
  rng = np.random.default_rng(0)
  tokenizer = tokenizers.load(folder / photographs.TOKENIZER)

  def loaded(sample: dict[str, bytes]) -> tuple[torch.Tensor, str]:
    pixels = np.ascontiguousarray(view(sample["jpg"], rng.random(5)))
    return torch.from_numpy(pixels), sample["txt"].decode()

  def collated(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, np.ndarray]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), tokenizer(texts, _LENGTH)[0]

  tars = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
  samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).repeat().map(loaded)
  batches = iter(torch.utils.data.DataLoader(samples, _BATCH, num_workers=0, collate_fn=collated))
  return lambda count: sum(len(next(batches)[0]) for _ in range(count))


def _plain(views: Iterator[tuple[np.ndarray, str]], folder: Path) -> Work:
  tokenizer = tokenizers.load(folder / photographs.TOKENIZER)

  def work(batches: int) -> int:
    done = 0
    for _ in range(batches):
      images, texts = zip(*itertools.islice(views, _BATCH), strict=True)
      done += len(np.stack(images))
      tokenizer(texts, _LENGTH)
    return done

  return work


READERS = {
  "ours, webdataset by offset": webdataset_by_offset,
  "ours, table of loose files": loose_files,
  "Grain, a plain function": grain_function,
  "DataLoader + webdataset": torch_webdataset,
  "DataLoader + webdataset, Pillow": torch_webdataset_pil,
}

if __name__ == "__main__":
  cv2.setNumThreads(0)
  turns.serve(READERS[sys.argv[1]](Path(sys.argv[2])))
