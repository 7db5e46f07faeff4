"""Scores a model on several sets and writes the results."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from contrastive_jax.bad_records import FILE, BadRecords
from contrastive_jax.evaluation.choices import evaluate_choices
from contrastive_jax.evaluation.diagnostics import drawn_rows, pair_diagnostics
from contrastive_jax.evaluation.first_features import FirstFeatures
from contrastive_jax.evaluation.gradients import softmax_gradient
from contrastive_jax.evaluation.multilabel import evaluate_multilabel
from contrastive_jax.evaluation.probes import few_shot, knn_probe, linear_probe
from contrastive_jax.evaluation.results import Result, result_path, write_result
from contrastive_jax.evaluation.retrieval import evaluate_retrieval
from contrastive_jax.evaluation.tasks import (
  ChoiceSet,
  Chosen,
  Encoder,
  EvaluationSet,
  Images,
  LabelledSet,
  MultiLabelSet,
  PairSet,
  kind_of,
)
from contrastive_jax.evaluation.unreadable import UnreadableSet, embedded, keep
from contrastive_jax.evaluation.zero_shot import evaluate_zero_shot

PROBES = {"linear": ("linear_probe", linear_probe), "knn": ("knn_probe", knn_probe)}
# Over how many draws of its few samples a probe is averaged.
DRAWS = 3


def evaluate(
  model: Encoder,
  sets: Iterable[EvaluationSet],
  *,
  workdir: Path,
  step: int,
  architecture: str,
  thorough: bool = False,
  unreadable: Callable[[str], None] | None = None,
  keep_in_run: bool = True,
  dims: Sequence[int] = (),
) -> list[Result]:
  """Scores a model on sets: by zero-shot classification, retrieval, or matching of hard pairs, as each set asks for.

  Every process calls it; the main one writes `<workdir>/eval/<set>@<step>.json`. Results of pair sets also hold the
  `diagnostics.pair_diagnostics` of the same embeddings, and where the gradient of a softmax loss would go.

  Args:
    model: the model, which embeds images and texts.
    sets: the sets to score; those that share one `images` have them embedded once if they stand together.
    workdir: the run directory, which the results name as their weights.
    step: step of the checkpoint.
    architecture: name of the model in the results.
    thorough: whether to add the diagnostics of pair sets that take longer: global AUC and separability.
    unreadable: is told, in a sentence, of a set without any image that can be read, which then has no result.
    keep_in_run: whether anything is written into `workdir`, which may be read-only.
    dims: numbers of first features of the embeddings that are scored as well, each as a task of its own, such as
      "first_64_zeroshot_retrieval".

  Returns:
    One result for each set, followed by those of `dims`, in their order, on every process. Images that cannot be read
    are left out of a set, counted in its result and named in `<workdir>/bad_records.jsonl`.

  Raises:
    UnreadableSet: if no image of a set can be read and nobody is to be told.
  """
  model, ledger = _Remembering(model), _ledger(workdir if keep_in_run else None)
  results = []
  for scored in sets:
    try:
      found = _score(model, scored, thorough, ledger, dims)
    except UnreadableSet as error:
      if unreadable is None:
        raise
      unreadable(str(error))
    else:
      results += [_written(result, workdir, step, architecture) if keep_in_run else result for result in found]
  return results


def probe(
  model: Encoder,
  train: LabelledSet,
  test: LabelledSet,
  *,
  kind: str,
  projected: bool = True,
  shots: int | None = None,
  workdir: Path,
  step: int,
  architecture: str,
  keep_in_run: bool = True,
) -> Result:
  """Measures how well frozen embeddings classify, and writes it beside the zero-shot result of the same set.

  Args:
    model: the model, which embeds images; it takes `projected` as `inference.Model` does where that is False.
    train: the set that the probe learns from.
    test: the set that it is scored on, with the classes of `train`.
    kind: a name in `PROBES`, with CLIP_benchmark's and DINO's parameters.
    projected: whether it sees the embeddings, or the tower's features before their projection.
    shots: number of samples of each class to learn from, drawn at random, with the mean over `DRAWS` draws; None takes
      all.
    workdir: the run directory, which the results name as their weights.
    step: step of the checkpoint.
    architecture: name of the model in the results.
    keep_in_run: whether anything is written into `workdir`, which may be read-only.

  Returns:
    The metrics of the probe, means over the draws where `shots` is given.

  Raises:
    UserError: if a class has fewer samples than `shots`.
  """
  task, measure = PROBES[kind]
  draws = [np.arange(len(train.images))]
  if shots:
    task, draws = f"{shots}_shot_{task}", [few_shot(train.labels, shots, seed=draw) for draw in range(DRAWS)]
  used = np.unique(np.concatenate(draws))
  embed = model.encode_image if projected else functools.partial(model.encode_image, projected=False)
  ledger = _ledger(workdir if keep_in_run else None)
  learned, good = embedded(embed, Chosen(train.images, used), f"{train.name} (to learn from)", ledger)
  if not good.any():
    raise UnreadableSet(f"none of the {len(used):,} images of {train.name} can be read: the probe has nothing to learn")
  learned, used = learned[good], used[good]
  draws = [rows[np.isin(rows, used)] for rows in draws]
  tested, good = embedded(embed, test.images, test.name, ledger)
  left_out = int(np.sum(~good))
  if left_out:
    test, rows = keep(test, good)
    tested = tested[rows]
  measured = [
    measure(learned[np.isin(used, rows)], train.labels[rows], tested, test.labels, classes=len(test.classes))
    for rows in draws
  ]
  result = Result(
    dataset=test.name,
    task=task if projected else f"unprojected_{task}",
    metrics={name: float(np.mean([metrics[name] for metrics in measured])) for name in measured[0]},
    language=test.language,
    sizes={kind_of(test.images): len(test.images), "classes": len(test.classes), "training": len(draws[0])},
    left_out=left_out,
  )
  return _written(result, workdir, step, architecture) if keep_in_run else result


def scalars(results: Iterable[Result]) -> dict[str, float]:
  """Puts the metrics of all results into one row, such as {"emoji_openmoji/acc1": 0.1}."""
  return {f"{result.dataset}/{name}": value for result in results for name, value in result.metrics.items()}


class _Remembering:
  """An encoder that keeps the embeddings it returned last: they are dear, and several measures ask for them."""

  def __init__(self, model: Encoder):
    self._model = model
    self._images: Images | None = None
    self._texts: list[str] | None = None
    self.image = self.text = np.zeros((0, 0), np.float32)

  @property
  def logit_scale(self) -> float:
    return self._model.logit_scale

  @property
  def mesh(self) -> Mesh | None:
    return getattr(self._model, "mesh", None)

  def encode_image(self, images: Images) -> np.ndarray:
    if images is not self._images:
      self.image, self._images = self._model.encode_image(images), images
    return self.image

  def readable(self, scored: EvaluationSet, ledger: BadRecords) -> EvaluationSet:
    """Returns the set without the images that cannot be read; those that can are embedded by then."""
    if scored.images is self._images or not len(scored.images):
      return scored
    self.image, good = embedded(self._model.encode_image, scored.images, scored.name, ledger)
    if not good.all():
      scored, rows = keep(scored, good)
      self.image = self.image[rows]
    self._images = scored.images
    return scored

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    if list(texts) != self._texts:
      self.text, self._texts = self._model.encode_text(texts), list(texts)
    return self.text


def _ledger(workdir: Path | None) -> BadRecords:
  return BadRecords(workdir / FILE if workdir and jax.process_index() == 0 else None)


def _score(
  model: _Remembering, scored: EvaluationSet, thorough: bool, ledger: BadRecords, dims: Sequence[int]
) -> list[Result]:
  readable = model.readable(scored, ledger)
  found = [_score_readable(model, readable, thorough)]
  for dim in dims:
    part = _score_readable(_Remembering(FirstFeatures(model, dim)), readable, thorough)
    found.append(dataclasses.replace(part, task=f"first_{dim}_{part.task}"))
  left_out = len(scored.images) - len(readable.images)
  return [dataclasses.replace(result, left_out=left_out) for result in found]


def _score_readable(model: _Remembering, scored: EvaluationSet, thorough: bool) -> Result:
  if isinstance(scored, ChoiceSet):
    return evaluate_choices(model, scored)
  if isinstance(scored, PairSet):
    result = evaluate_retrieval(model, scored)
    image, text, image_group, text_group = model.image, model.text, scored.image_group, scored.caption_group
    further = pair_diagnostics(image, text, image_group, text_group, thorough=thorough)
    i, t = drawn_rows(len(image), len(text))
    some = image[i], text[t], image_group[i], text_group[t]
    weights, profile = softmax_gradient(*some, logit_scale=float(model.logit_scale))
    return dataclasses.replace(result, metrics={**result.metrics, **further, **weights}, gradient=profile)
  if isinstance(scored, MultiLabelSet):
    result = evaluate_multilabel(model, scored)
  else:
    result = evaluate_zero_shot(model, scored)
  return dataclasses.replace(result, templates_source=scored.templates_source)


def _written(result: Result, workdir: Path, step: int, architecture: str) -> Result:
  if jax.process_index() == 0:
    path = result_path(workdir, result.dataset, step, result.task)
    write_result(path, result, model=architecture, pretrained=f"{workdir}@{step}")
  return result
