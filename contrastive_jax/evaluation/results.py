"""What an evaluation found: numbers for machines in CLIP_benchmark's JSON, examples for people in the report."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Examples are kept in memory and written into the report: large enough to recognise, small enough to be many.
THUMBNAIL_SIZE = 112

# Anonymous sizes: the pictures of one example need not be equally large.
Picture = UInt8[np.ndarray, "_ _ 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Guess:
  """One image of a labelled set and the classes the model finds most probable.

  Attributes:
    image: a thumbnail.
    truth: the right class.
    predictions: (class, probability), most probable first.
    correct: whether the first prediction is right.
  """

  image: Picture
  truth: str
  predictions: tuple[tuple[str, float], ...]
  correct: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Confusion:
  """A class that is taken for another.

  Attributes:
    truth: the right class.
    predicted: the class given instead.
    image: the image that was taken for `predicted` with most confidence.
    predicted_image: an image of the class `predicted`, or None where the set has none.
    count: how many images of `truth` were taken for `predicted`.
    probability: the probability given to `predicted` for `image`.
  """

  truth: str
  predicted: str
  image: Picture
  predicted_image: Picture | None
  count: int
  probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
  """One retrieval query and what came first: a caption that searches images, or an image that searches captions.

  Attributes:
    query: a caption or a thumbnail.
    found: (thumbnail or caption, cosine similarity, whether it belongs to the query), nearest first.
  """

  query: str | Picture
  found: tuple[tuple[str | Picture, float, bool], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
  """The outcome of one task.

  Attributes:
    dataset: name of the evaluation set.
    task: "zeroshot_classification" or "zeroshot_retrieval", CLIP_benchmark's names.
    metrics: fractions by CLIP_benchmark's names.
    language: of the prompts or captions.
    sizes: what the set holds: {"images": 10000, "classes": 10} or {"images": 5000, "captions": 25000}.
    guesses: some images and their predictions.
    confusions: the worst confusions, most frequent first.
    searches: some queries and what they found.
  """

  dataset: str
  task: str
  metrics: dict[str, float]
  language: str
  sizes: dict[str, int]
  guesses: tuple[Guess, ...] = ()
  confusions: tuple[Confusion, ...] = ()
  searches: tuple[Search, ...] = ()


def thumbnail(image: Picture) -> Picture:
  """The image with its longer side at most `THUMBNAIL_SIZE` pixels; smaller images stay as they are."""
  height, width = image.shape[:2]
  if max(height, width) <= THUMBNAIL_SIZE:
    return np.array(image)
  scale = THUMBNAIL_SIZE / max(height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def as_json(result: Result, *, model: str, pretrained: str) -> dict[str, object]:
  """The result in CLIP_benchmark's schema.

  Args:
    result: of one task.
    model: the architecture, such as "clip_b32".
    pretrained: which weights, such as the run directory.
  """
  return {
    "dataset": result.dataset,
    "model": model,
    "pretrained": pretrained,
    "task": result.task,
    "metrics": {name: float(value) for name, value in result.metrics.items()},
    "language": result.language,
  }


def result_path(workdir: str | os.PathLike, dataset: str, step: int) -> Path:
  """Where the result of a set lies in a run: `<workdir>/eval/<dataset>@<step>.json`, "/" replaced by "_"."""
  return Path(workdir) / "eval" / f"{dataset.replace('/', '_')}@{step}.json"


def write_result(path: str | os.PathLike, result: Result, *, model: str, pretrained: str) -> Path:
  """Writes one result as JSON, atomically: a reader never sees half a file.

  Args:
    path: see `result_path`; directories are made.
    result: of one task.
    model: see `as_json`.
    pretrained: see `as_json`.
  """
  text = json.dumps(as_json(result, model=model, pretrained=pretrained), indent=2, ensure_ascii=False, allow_nan=False)
  return write_atomically(path, text + "\n")


def write_atomically(path: str | os.PathLike, text: str) -> Path:
  """Writes UTF-8 text beside `path` and renames it into place."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
  return path


def headline(result: Result) -> Mapping[str, str]:
  """The result in words: its first "metric", that as a "figure" such as "9.4%", and a "sentence" that follows it."""
  sizes, metrics = result.sizes, result.metrics
  if "acc1" in metrics:
    chance = 1 / sizes["classes"]
    times = f"{metrics['acc1'] / chance:,.0f} times chance" if metrics["acc1"] >= 2 * chance else "near chance"
    sentence = f"of {sizes['images']:,} images are given their right name out of {sizes['classes']:,}: {times}"
    sentence += f" ({percent(chance)})"
    return {"metric": "acc1", "figure": percent(metrics["acc1"]), "sentence": sentence}
  name = max((name for name in metrics if name.startswith("image_retrieval_recall@")), key=_cutoff)
  sentence = (
    f"of {sizes['captions']:,} captions find their image among the first {_cutoff(name)} of {sizes['images']:,}"
  )
  return {"metric": name, "figure": percent(metrics[name]), "sentence": sentence}


def _cutoff(metric: str) -> int:
  return int(metric.rpartition("@")[2])


def percent(fraction: float) -> str:
  """One decimal, two under one percent: 0.0005 -> "0.05%", 0.0942 -> "9.4%"."""
  value = 100 * fraction
  return f"{value:.2f}%" if value < 0.995 else f"{value:.1f}%"
