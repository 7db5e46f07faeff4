"""Results of an evaluation: numbers for machines in CLIP_benchmark's JSON, examples for people in the report."""

import dataclasses
import hashlib
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.gradients import GradientProfile
from contrastive_jax.preprocess.images import composite, decode
from contrastive_jax.preprocess.video import Clip, choose_frames
from contrastive_jax.runs import read_object, write_object

log = logging.getLogger(__name__)

# Examples are kept in memory and written into the report: large enough to recognise, small enough to be many.
THUMBNAIL_SIZE = 112
# Between the frames of a clip: pixels, and their grey.
GAP, GAP_LEVEL = 2, 224

# What is not better the higher it is, and is written as a number and not as a percentage.
PLAIN_METRICS = (
  "alignment",
  "modality_gap",
  "modality_separability",
  "uniformity_image",
  "uniformity_text",
  "uniformity_cross",
  "rank_image",
  "rank_text",
  "effective_negatives",
  "weight_of_hardest",
  "weight_of_positive",
  "expected_calibration_error",
)
# The first of these that a result has is the one people ask for.
MAIN_METRICS = ("acc1", "mean_average_precision", "lp_acc1", "knn_acc1", "acc")
# With a cut-off behind it: what is asked for where a result has none of them.
IMAGE_RECALL = "image_retrieval_recall@"

# Embeddings of so many images that vary in fewer directions than these have collapsed.
COLLAPSED, ENOUGH_FOR_RANK = 3, 32

# Of the name of a result's file: file systems allow 255, and what is written beside it has a longer name.
_NAME_BYTES = 200

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
    task: "zeroshot_classification", "zeroshot_retrieval", "image_caption_selection" or "linear_probe", CLIP_benchmark's
      names; or "knn_probe"; before a probe's name "unprojected_" and "5_shot_" where it is one, and before any name
      "first_64_" where that many features of the embeddings are scored.
    metrics: fractions by CLIP_benchmark's names, and what `PLAIN_METRICS` lists.
    language: language of the prompts or captions.
    sizes: numbers of its items, such as {"images": 10000, "classes": 10} or {"clips": 5000, "captions": 25000}.
    templates_source: who wrote the prompts, or that none are published for the set; "" where they are the set's own.
    left_out: images of the set that cannot be read, which `sizes` and `metrics` know nothing of.
    guesses: some images and their predictions.
    confusions: the worst confusions, most frequent first.
    searches: some queries and what they found.
    gradient: where the gradient of a softmax loss would go, by similarity, or None.
  """

  dataset: str
  task: str
  metrics: dict[str, float]
  language: str
  sizes: dict[str, int]
  templates_source: str = ""
  left_out: int = 0
  guesses: tuple[Guess, ...] = ()
  confusions: tuple[Confusion, ...] = ()
  searches: tuple[Search, ...] = ()
  gradient: GradientProfile | None = None


def thumbnail(item: UInt8[np.ndarray, "_ _ _"] | Clip) -> Picture:
  """Puts an image on white and reduces its longer side to at most `THUMBNAIL_SIZE` pixels.

  Of a clip it shows four frames, in two rows.
  """
  if not isinstance(item, Clip):
    return _at_most(decode(item), THUMBNAIL_SIZE)
  frames = item.read(choose_frames(item.count, item.fps, 4, "uniform"))
  tiles = [_at_most(composite(f) if f.shape[2] == 4 else f, (THUMBNAIL_SIZE - GAP) // 2) for f in frames]
  height, width = tiles[0].shape[:2]
  sheet = np.full((2 * height + GAP, 2 * width + GAP, 3), GAP_LEVEL, np.uint8)
  for number, tile in enumerate(tiles):
    top, left = (number // 2) * (height + GAP), (number % 2) * (width + GAP)
    sheet[top : top + height, left : left + width] = tile
  return sheet


def _at_most(image: Picture, side: int) -> Picture:
  height, width = image.shape[:2]
  if max(height, width) <= side:
    return np.array(image)
  scale = side / max(height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def as_json(result: Result, *, model: str, pretrained: str) -> dict[str, object]:
  """Writes a result in CLIP_benchmark's schema, with two more fields where they say anything.

  "templates_source" names the author of prompts that are not the set's own, and "left_out" counts the images that
  cannot be read.

  Args:
    result: the result of one task.
    model: the architecture, such as "clip_b32".
    pretrained: the weights, such as the run directory.
  """
  content = {
    "dataset": result.dataset,
    "model": model,
    "pretrained": pretrained,
    "task": result.task,
    "metrics": {name: float(value) for name, value in result.metrics.items()},
    "language": result.language,
  }
  content |= {"templates_source": result.templates_source} if result.templates_source else {}
  return content | ({"left_out": result.left_out} if result.left_out else {})


def result_path(workdir: str | os.PathLike, dataset: str, step: int, task: str = "") -> Path:
  """Returns the file of a result in a run: `<workdir>/eval/<dataset>@<step>.json`, with "/" replaced by "_".

  Args:
    workdir: the run directory.
    dataset: name of the set.
    step: step of the checkpoint.
    task: name of the task. That of a probe, or of the first features of embeddings, is put behind the step, so that
      its result lies beside the zero-shot one of the same set, and `*@<step>.json` matches the latter alone.
  """
  beside = f".{task}" if task.endswith("_probe") or task.startswith("first_") else ""
  name, end = dataset.replace("/", "_"), f"@{step}{beside}.json"
  # A split of many parts may be longer than a file system's names.
  if len(name.encode()) + len(end) > _NAME_BYTES:
    name = f"{name[:100]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}"
  return Path(workdir) / "eval" / f"{name}{end}"


def write_result(path: str | os.PathLike, result: Result, *, model: str, pretrained: str) -> Path:
  """Writes one result as JSON, atomically: a reader never sees half a file.

  Args:
    path: the file, as `result_path` names it; directories are made.
    result: the result of one task.
    model: the architecture, such as "clip_b32".
    pretrained: the weights, such as the run directory.

  Raises:
    ValueError: if a metric is not finite.
  """
  wrong = [name for name, value in result.metrics.items() if not math.isfinite(value)]
  if wrong:
    raise ValueError(f"{wrong[0]} of {result.dataset} is {result.metrics[wrong[0]]}")
  return write_object(path, as_json(result, model=model, pretrained=pretrained))


def read_result(path: str | os.PathLike) -> dict[str, Any]:
  """Reads what `write_result` wrote.

  Raises:
    UserError: if the file is missing, damaged or holds something else.
  """
  content = read_object(path)
  wanted = {"dataset": str, "task": str, "metrics": dict}
  sound = all(isinstance(content.get(name), kind) for name, kind in wanted.items())
  if not sound or not any(map(_is_main, content["metrics"])):
    raise UserError(f"{path} holds no result of an evaluation: delete it, and score the run again with eval.py")
  for name, value in content["metrics"].items():
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise UserError(f"{path}: {name} is {value!r}: delete the file, and score the run again with eval.py")
  return content


def read_results(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
  """Reads all results that can be read, each with its path; a warning names each that cannot."""
  for path in paths:
    try:
      yield path, read_result(path)
    except UserError as error:
      log.warning("A result is left out: %s.", error)


def headline(result: Result) -> Mapping[str, str]:
  """Puts a result in words: its first "metric", its value as a "figure" such as "9.4%", and a "sentence" after it."""
  sizes, metrics = result.sizes, result.metrics
  name = main_metric(metrics)
  shown = next(what for what in ("images", "clips") if what in sizes)
  if name == "acc1":
    chance = 1 / sizes["classes"]
    times = f"{metrics['acc1'] / chance:,.0f} times chance" if metrics["acc1"] >= 2 * chance else "near chance"
    sentence = f"of {sizes[shown]:,} {shown} are classified correctly among {sizes['classes']:,} classes: {times}"
    sentence += f" ({percent(chance)})"
  elif name == "mean_average_precision":
    sentence = f"mean average precision of {sizes['classes']:,} classes among {sizes[shown]:,} {shown}"
  elif name in ("lp_acc1", "knn_acc1"):
    by = "a linear probe" if name == "lp_acc1" else "a nearest-neighbour classifier"
    on = "the unprojected features of " if result.task.startswith("unprojected_") else ""
    on = f"{on}{sizes['training']:,} {shown}"
    sentence = f"of {sizes[shown]:,} {shown} are classified correctly by {by} trained on {on}"
  elif name == "acc":
    sentence = f"of {sizes['instances']:,} groups of {shown} and similar captions are matched correctly"
  else:
    what = shown.removesuffix("s")
    sentence = (
      f"of {sizes['captions']:,} captions rank their {what} among the first {_cutoff(name)} of {sizes[shown]:,}"
    )
  if found := re.match(r"first_(\d+)_", result.task):
    sentence += f", by the first {found[1]} features of the embeddings"
  few = [side for side in ("image", "text") if metrics.get(f"rank_{side}", math.inf) < COLLAPSED]
  if few and sizes[shown] >= ENOUGH_FOR_RANK and not result.task.startswith("first_"):
    sentence += f"; the {' and '.join(few)} embeddings use fewer than {COLLAPSED} directions: they have collapsed"
  if result.left_out:
    sentence += f"; {result.left_out:,} more cannot be read and were left out"
  return {"metric": name, "figure": percent(metrics[name]), "sentence": sentence}


def main_metric(names: Collection[str]) -> str:
  """Names the metric people ask for first: accuracy, mean average precision, or image recall at the largest cut-off."""
  for name in MAIN_METRICS:
    if name in names:
      return name
  return max(filter(_is_main, names), key=_cutoff)


def scored_sets(rows: Iterable[Mapping[str, object]]) -> dict[str, str]:
  """Lists the sets that were scored in training, each with its main metric, such as {"emoji_openmoji": "acc1"}.

  Args:
    rows: the rows of `metrics.jsonl`, which call a score "<set>/<metric>".
  """
  found: dict[str, list[str]] = {}
  for key in dict.fromkeys(key for row in rows for key in row):
    dataset, _, metric = key.rpartition("/")
    if dataset and _is_main(metric):
      found.setdefault(dataset, []).append(metric)
  return {dataset: main_metric(metrics) for dataset, metrics in found.items()}


def _is_main(metric: str) -> bool:
  return metric in MAIN_METRICS or (metric.startswith(IMAGE_RECALL) and metric.rpartition("@")[2].isdecimal())


def _cutoff(metric: str) -> int:
  return int(metric.rpartition("@")[2])


def percent(fraction: float) -> str:
  """Writes a share as a percentage with one decimal, or two under one percent.

  Examples:
    >>> percent(0.0005), percent(0.0942)
    ('0.05%', '9.4%')
  """
  value = 100 * fraction
  return f"{value:.2f}%" if value < 0.995 else f"{value:.1f}%"


def figure(metric: str, value: float) -> str:
  """Writes a metric as text: a percentage, or three digits where it is one of `PLAIN_METRICS`."""
  return f"{value:.3g}" if metric in PLAIN_METRICS else percent(value)
