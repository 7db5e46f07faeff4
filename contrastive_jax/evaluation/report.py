"""The report of a run: one HTML file that needs nothing else, not even a network."""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from PIL import Image

from contrastive_jax.evaluation import curves, histograms
from contrastive_jax.evaluation.results import (
  Result,
  figure,
  headline,
  main_metric,
  percent,
  scored_sets,
)
from contrastive_jax.evaluation.stages import StageScores
from contrastive_jax.runs import write_atomically

_FIXED_NAMES = {
  "acc1": "Top-1 accuracy",
  "acc5": "Top-5 accuracy",
  "mean_per_class_recall": "Mean per-class recall",
  "mean_average_precision": "Mean average precision",
  "image_acc": "All images found by their captions",
  "text_acc": "All captions found by their images",
  "acc": "All images and captions found",
  "lp_acc1": "Top-1 accuracy of a linear probe",
  "lp_acc5": "Top-5 accuracy of a linear probe",
  "lp_mean_per_class_recall": "Mean per-class recall of a linear probe",
  "knn_acc1": "Top-1 accuracy of the nearest neighbours",
  "knn_acc5": "Top-5 accuracy of the nearest neighbours",
  "knn_mean_per_class_recall": "Mean per-class recall of the nearest neighbours",
  "alignment": "Alignment: squared distance within a pair",
  "modality_gap": "Distance between the means of images and texts",
  "modality_separability": "Linear separability of images and texts",
  "global_auc": "AUC of all pairs together",
  "expected_calibration_error": "Expected calibration error",
  "uniformity_image": "Uniformity of images",
  "uniformity_text": "Uniformity of texts",
  "uniformity_cross": "Uniformity of images and texts that do not belong together",
  "rank_image": "Directions that image embeddings use",
  "rank_text": "Directions that text embeddings use",
  "effective_negatives": "Negatives of an image that a softmax pushes, effectively",
  "weight_of_hardest": "Share of that push on the most similar hundredth",
  "weight_of_positive": "Weight with which a softmax pulls a pair together",
}
_LANGUAGES = {
  "ar": "Arabic",
  "de": "German",
  "en": "English",
  "es": "Spanish",
  "fa": "Persian",
  "fr": "French",
  "id": "Indonesian",
  "it": "Italian",
  "ja": "Japanese",
  "ko": "Korean",
  "pt": "Portuguese",
  "ru": "Russian",
  "tr": "Turkish",
  "zh": "Chinese",
}


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  config: Mapping[str, Any],
  metrics: Sequence[Mapping[str, Any]],
  evaluations: Sequence[Result],
  attribution: str,
  facts: Mapping[str, str] | None = None,
  commands: Sequence[str] = (),
  stages: Sequence[tuple[str, int]] = (),
  by_stage: Sequence[StageScores] = (),
  samples: Mapping[str, Float[np.ndarray, "_"]] | None = None,
) -> Path:
  """Writes the report, atomically.

  Args:
    path: path of the HTML file.
    title: name of the run.
    config: the resolved config, nested.
    metrics: the rows of `metrics.jsonl`, each with its `step`; curves of evaluations come from names such as
      "emoji_openmoji/acc1".
    evaluations: the results; the first gives the headline.
    attribution: the authors of the pictures and their licences.
    facts: further facts about the run, by label, such as {"Parameters": "4.2 M", "Time": "5 min 20 s"}.
    commands: the command lines that make the run again, in order.
    stages: (name, first step) of each stage of a run that has several; the curves show where they begin.
    by_stage: the scores at the end of each stage, from `stages.stage_scores`; several are shown as a table.
    samples: positive numbers of samples, by what they are, which are shown as histograms.
  """
  several = _several_languages(evaluations)
  # One language stands for all of a set: fourteen galleries of the same pictures would tell no more than one.
  others = {id(result) for results in several.values() for result in results[1:]}
  shown = [result for result in evaluations if id(result) not in others]
  page = render(
    "report.html.j2",
    title=title,
    evaluations=shown,
    headlines=[headline(result) for result in shown],
    charts=charts(metrics, stages),
    stages=stages,
    histograms=sample_histograms(samples or {}),
    gradients=gradient_charts(shown),
    by_stage=by_stage if len(by_stage) > 1 else (),
    staged_sets=list(dict.fromkeys(name for stage in by_stage for name in stage.scores)),
    languages=[language_bars(dataset, results) for dataset, results in several.items()],
    config=flat(config),
    facts=run_facts(config, metrics) | dict(facts or {}),
    commands=commands,
    attribution=attribution,
  )
  return write_atomically(path, page)


def render(template: str, **values: Any) -> str:
  """Renders a page of this package as one HTML file with its style and pictures inside.

  Args:
    template: file name of the page's template.
    values: the values that the template shows.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {
    "picture": picture,
    "percent": percent,
    "figure": figure,
    "metric": metric_name,
    "size": natural_size,
  }
  return environment.get_template(template).render(plot=curves, **values)


def _several_languages(evaluations: Sequence[Result]) -> dict[str, list[Result]]:
  """Groups the results of each set that was scored in several languages: "emoji", "emoji_de" in German, ..."""
  grouped: dict[str, list[Result]] = {}
  for result in evaluations:
    if result.task == "zeroshot_classification":
      grouped.setdefault(result.dataset.removesuffix(f"_{result.language}"), []).append(result)
  return {dataset: results for dataset, results in grouped.items() if len({each.language for each in results}) > 1}


def language_bars(dataset: str, results: Sequence[Result]) -> tuple[str, str, list[tuple[str, float]]]:
  """Returns the set, its main metric, and (language, value) of each result, best first."""
  metric = main_metric(results[0].metrics)
  rows = [(_LANGUAGES.get(result.language, result.language), result.metrics[metric]) for result in results]
  return dataset, metric, sorted(rows, key=lambda row: -row[1])


def sample_histograms(samples: Mapping[str, Float[np.ndarray, "_"]]) -> list[histograms.Histogram]:
  """Makes a histogram of each quantity that some samples have."""
  made = [histograms.ratios(name, values, ("sample", "samples")) for name, values in samples.items()]
  return [histogram for histogram in made if histogram is not None]


def gradient_charts(evaluations: Sequence[Result]) -> list[curves.Chart]:
  """Makes a chart of each result that knows where the gradient of a softmax loss would go."""
  made = []
  for result in evaluations:
    if (found := result.gradient) is not None:
      sides = {"pushed apart": found.push, "pulled together": found.pull, "other captions": found.negatives}
      made.append(
        curves.chart(
          result.dataset,
          {name: list(zip(found.similarities.tolist(), line.tolist(), strict=True)) for name, line in sides.items()},
          first_step=float(found.similarities[0]),
          last_step=float(found.similarities[-1]),
          from_zero=True,
          percent=True,
          over="similarity",
        )
      )
  return [chart for chart in made if chart is not None]


def charts(rows: Sequence[Mapping[str, Any]], stages: Sequence[tuple[str, int]] = ()) -> list[curves.Chart]:
  """Makes the charts that the rows have enough points for, with the beginnings of the stages."""
  last = max((float(row["step"]) for row in rows), default=0.0) or 1.0
  drawn = [
    ("Loss", {"loss": curves.series(rows, "loss")}, {"smooth": True}),
    ("Scores during training", score_series(rows), {"from_zero": True, "percent": True}),
    ("Accuracy within the batch", accuracy_series(rows), {"smooth": True, "from_zero": True, "percent": True}),
    ("Gradient norm", {"gradient norm": curves.series(rows, "grad_norm")}, {"smooth": True, "from_zero": True}),
    ("Logit scale", {"logit scale": curves.series(rows, "logit_scale")}, {}),
    ("Learning rate", {"learning rate": curves.series(rows, "learning_rate")}, {"from_zero": True}),
    ("Images per second", {"images/s": speed_series(rows)}, {"from_zero": True, "smooth": True}),
  ]
  marked = [(name, float(first)) for name, first in stages if first < last] if len(stages) > 1 else []
  made = [curves.chart(title, named, last_step=last, stages=marked, **options) for title, named, options in drawn]
  return [chart for chart in made if chart is not None]


def speed_series(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
  """Returns images per second without the first window, whose compilation would set the scale for all others."""
  speed = curves.series(rows, "images_per_second")
  return speed[1:] if len(speed) > 3 else speed


def score_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
  """Returns the scores that evaluations in training logged: the main metric of each set, and top-5 beside top-1."""
  sets = scored_sets(rows)
  drawn = {}
  for dataset, main in sets.items():
    for metric in (main, "acc5") if main == "acc1" else (main,):
      short = {"acc1": "top-1", "acc5": "top-5"}.get(metric, metric_name(metric))
      name = short if len(sets) == 1 else f"{dataset} {short}"
      drawn[name] = curves.series(rows, f"{dataset}/{metric}")
  return drawn


def accuracy_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
  """Returns how often the right partner wins within the batch, in both directions, by each term that measures it."""
  ways = {"accuracy_image_to_text": "image to text", "accuracy_text_to_image": "text to image"}
  found = {}
  for key in dict.fromkeys(key for row in rows for key in row):
    term, _, metric = key.rpartition("/")
    if metric in ways:
      found[f"{term} {ways[metric]}".strip()] = curves.series(rows, key)
  return found


def run_facts(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Lists the facts about the run that the config and the rows alone tell."""
  facts = {}
  if rows:
    last = max(int(row["step"]) for row in rows)
    facts["Steps"] = f"{last:,}"
    if isinstance(config.get("batch_size"), int):
      facts["Batch size"] = f"{config['batch_size']:,} pairs"
      if not config.get("curriculum"):
        facts["Pairs seen"] = f"{last * config['batch_size']:,}"
  loss = curves.series(rows, "loss")
  if loss:
    facts["Final loss"] = f"{loss[-1][1]:.4g}"
  speed = [value for _, value in curves.series(rows, "images_per_second")]
  if speed:
    facts["Images per second"] = f"{float(np.median(speed)):,.0f} (median)"
  return facts


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """Flattens a nested config to (dotted name, value) rows."""
  rows = []
  for name, value in tree.items():
    if isinstance(value, list | tuple) and value and all(isinstance(each, Mapping) for each in value):
      value = {str(number): each for number, each in enumerate(value)}
    if isinstance(value, Mapping) and value:
      rows += flat(value, f"{prefix}{name}.")
    else:
      rows.append((f"{prefix}{name}", str(value)))
  return rows


def metric_name(metric: str) -> str:
  """Puts CLIP_benchmark's name of a metric in words."""
  if found := re.fullmatch(r"acc1_of_(\d+)", metric):
    return f"Top-1 accuracy among {found[1]} drawn classes"
  if found := re.fullmatch(r"(image|text)_retrieval_recall@(\d+)", metric):
    way = "caption to image" if found[1] == "image" else "image to caption"
    return f"Recall@{found[2]}, {way}"
  return _FIXED_NAMES.get(metric, metric)


def picture(image: np.ndarray) -> str:
  """Returns the image as a PNG in a data URI."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def natural_size(image: np.ndarray) -> str:
  """Returns the class of the style sheet for a picture so small that enlarging should keep its pixels."""
  return "pixels" if max(image.shape[:2]) <= 40 else "smooth"
