"""Zero-shot classification: each class is a point, the mean embedding of its prompts; an image belongs to the nearest.

Numbers agree with CLIP_benchmark's zeroshot_classification.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from contrastive_jax.evaluation.arrays import checked, require_below
from contrastive_jax.evaluation.calibration import expected_calibration_error
from contrastive_jax.evaluation.results import Confusion, Guess, Result, thumbnail
from contrastive_jax.evaluation.tasks import Encoder, LabelledSet, kind_of

# Prompts embedded at once: 22,000 classes with 80 templates would not fit in memory together.
PROMPTS_AT_ONCE = 1 << 16
SHOWN_PREDICTIONS = 5


def classifier(
  model: Encoder, classes: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Float[np.ndarray, "classes dim"]:
  """Makes one unit vector of each class: the mean of its prompts' unit vectors, normalised again.

  Args:
    model: the model, which embeds the prompts.
    classes: the class names.
    templates: the prompts, in which `{}` stands for the class name.

  Follows CLIP, section 3.1.4 (Radford et al. 2021), and CLIP_benchmark's zero_shot_classifier.
  """
  step = max(1, PROMPTS_AT_ONCE // len(templates))
  means = []
  for start in range(0, len(classes), step):
    some = classes[start : start + step]
    prompts = [template.replace("{}", name) for name in some for template in templates]
    means.append(model.encode_text(prompts).reshape(len(some), len(templates), -1).mean(axis=1))
  mean = np.concatenate(means)
  return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.finfo(np.float32).tiny)


@checked
def predict(
  image: Float[np.ndarray, "images dim"],
  weights: Float[np.ndarray, "classes dim"],
  *,
  logit_scale: float,
  k: int,
  block: int = 1024,
) -> tuple[Int[np.ndarray, "images k"], Float[np.ndarray, "images k"]]:
  """Finds the `k` most probable classes of each image, most probable first, ties to the lowest index.

  Args:
    image: L2-normalised embeddings of the images.
    weights: the vector of each class, as `classifier` makes them.
    logit_scale: multiplier of the cosines, whose softmax over the classes are the probabilities.
    k: number of classes to find, at most all.
    block: number of images that are scored at once. Peak memory is block x classes.

  Returns:
    The indices of the classes, and their probabilities.

  Raises:
    ValueError: if `k` exceeds the number of classes.

  Examples:
    >>> image, weights = np.float32([[1, 0]]), np.float32([[0, 1], [1, 0]])
    >>> classes, probabilities = predict(image, weights, logit_scale=1.0, k=2)
    >>> classes.tolist(), probabilities.round(3).tolist()
    ([[1, 0]], [[0.7310000061988831, 0.26899999380111694]])
  """
  if not 0 < k <= len(weights):
    raise ValueError(f"the {k} most probable classes need at least {k} classes, got {len(weights)}")
  block = min(block, max(len(image), 1))
  weights = jnp.asarray(weights)
  indices, probabilities = [], []
  for start in range(0, len(image), block):
    some = image[start : start + block]
    padded = np.pad(some, ((0, block - len(some)), (0, 0)))  # One shape, one compilation.
    best, probability = jax.device_get(_score(padded, weights, jnp.float32(logit_scale), k=k))
    indices.append(best[: len(some)])
    probabilities.append(probability[: len(some)])
  if not indices:
    return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
  return np.concatenate(indices), np.concatenate(probabilities)


@jax.jit(static_argnames="k")
def _score(image: Float[Array, "block dim"], weights: Float[Array, "classes dim"], scale: Float[Array, ""], *, k: int):
  # Accelerators multiply float32 in fewer bits unless told otherwise: that reorders near neighbours.
  cosine = jnp.matmul(image, weights.T, precision=jax.lax.Precision.HIGHEST)
  # Ranking before scaling keeps apart what rounding would tie.
  best_cosine, best = jax.lax.top_k(cosine, k)
  return best, jnp.exp(scale * best_cosine - jax.nn.logsumexp(scale * cosine, axis=1, keepdims=True))


@checked
def balanced_accuracy(predicted: Int[np.ndarray, "images"], labels: Int[np.ndarray, "images"]) -> float:
  """Averages, over the classes that have images, the share of their images that is predicted right.

  Args:
    predicted: the predicted class of each image.
    labels: the right class of each image.

  Examples:
    >>> balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    0.75
  """
  _, position = np.unique(labels, return_inverse=True)
  return float(np.mean(np.bincount(position, weights=predicted == labels) / np.bincount(position)))


@checked
def accuracy_of_draws(
  image: Float[np.ndarray, "images dim"],
  weights: Float[np.ndarray, "classes dim"],
  labels: Int[np.ndarray, "images"],
  *,
  classes_per_draw: int = 100,
  draws: int = 20,
  seed: int = 0,
) -> Float[np.ndarray, "draws"]:
  """Computes top-1 accuracy among a few classes drawn at random, again and again: a number people can grasp.

  Args:
    image: L2-normalised embeddings of the images.
    weights: the vector of each class, as `classifier` makes them.
    labels: the right class of each image.
    classes_per_draw: number of classes drawn without replacement from those that have images; only their images are
      scored.
    draws: number of draws; draw `i` depends on `seed` and `i` alone.
    seed: seed of the draws.

  Returns:
    The accuracy of each draw.

  Raises:
    ValueError: if fewer than `classes_per_draw` classes have images.

  Examples:
    >>> classes = np.eye(3, dtype=np.float32)
    >>> accuracy_of_draws(classes, classes, np.arange(3), classes_per_draw=2, draws=2).tolist()
    [1.0, 1.0]
  """
  require_below(labels, len(weights), "labels")
  present = np.unique(labels)
  if classes_per_draw > len(present):
    raise ValueError(f"classes_per_draw={classes_per_draw} needs as many classes with images, there are {len(present)}")
  accuracies = []
  for draw in range(draws):
    drawn = np.sort(np.random.default_rng((seed, draw)).choice(present, classes_per_draw, replace=False))
    rows = np.flatnonzero(np.isin(labels, drawn))
    # On the host: every draw has its own number of images, and each shape would be compiled.
    nearest = np.argmax(image[rows] @ weights[drawn].T, axis=1)
    accuracies.append(np.mean(drawn[nearest] == labels[rows]))
  return np.asarray(accuracies)


def evaluate_zero_shot(
  model: Encoder,
  labelled: LabelledSet,
  *,
  classes_per_draw: int = 100,
  draws: int = 20,
  seed: int = 0,
  examples: int = 24,
  confusions: int = 12,
) -> Result:
  """Scores a labelled set without training on it.

  Args:
    model: the model, which embeds images and prompts.
    labelled: the set; its images are read a batch at a time, and only embeddings are kept.
    classes_per_draw: the n of "acc1_of_<n>", the mean of `accuracy_of_draws`, which is added where at least twice as
      many classes have images; 0 never adds it.
    draws: number of draws.
    seed: seed of the draws and of the choice of examples.
    examples: number of images to keep with their predictions, half of them right where there are enough.
    confusions: number of confusions to keep.

  Returns:
    The metrics acc1, acc5 (absent under 5 classes), mean_per_class_recall (balanced accuracy),
    expected_calibration_error at the model's scale, and perhaps acc1_of_100; and examples.
  """
  if not len(labelled.images):
    raise ValueError(f"{labelled.name} has no images to evaluate on")
  weights = classifier(model, labelled.classes, labelled.templates)
  image = model.encode_image(labelled.images)
  shown = min(SHOWN_PREDICTIONS, len(labelled.classes))
  best, probability = predict(image, weights, logit_scale=model.logit_scale, k=shown)
  hit = best == labelled.labels[:, None]
  metrics = {"acc1": float(np.mean(hit[:, 0]))}
  if shown == 5:
    metrics["acc5"] = float(np.mean(hit.any(axis=1)))
  metrics["mean_per_class_recall"] = balanced_accuracy(best[:, 0], labelled.labels)
  metrics["expected_calibration_error"] = expected_calibration_error(probability[:, 0], hit[:, 0])
  if classes_per_draw and len(np.unique(labelled.labels)) >= 2 * classes_per_draw:
    accuracies = accuracy_of_draws(
      image, weights, labelled.labels, classes_per_draw=classes_per_draw, draws=draws, seed=seed
    )
    metrics[f"acc1_of_{classes_per_draw}"] = float(np.mean(accuracies))
  return Result(
    dataset=labelled.name,
    task="zeroshot_classification",
    metrics=metrics,
    language=labelled.language,
    sizes={kind_of(labelled.images): len(labelled.images), "classes": len(labelled.classes)},
    guesses=_some_guesses(labelled, best, probability, count=examples, seed=seed),
    confusions=_worst_confusions(labelled, best[:, 0], probability[:, 0], count=confusions),
  )


def _some_guesses(labelled: LabelledSet, best, probability, *, count: int, seed: int) -> tuple[Guess, ...]:
  order = np.random.default_rng(seed).permutation(len(best))
  if labelled.groups is not None:
    _, first = np.unique(labelled.groups[order], return_index=True)
    order = order[np.sort(first)]
  right = best[order, 0] == labelled.labels[order]
  # Half and half, and where one kind runs short the other fills up; in the random order.
  wrong_kept = max(min(math.ceil(count / 2), np.sum(~right)), count - np.sum(right))
  rank = np.where(right, np.cumsum(right), np.cumsum(~right))
  chosen = order[np.where(right, rank <= count - wrong_kept, rank <= wrong_kept)]
  return tuple(
    Guess(
      image=thumbnail(labelled.images[int(row)]),
      truth=labelled.classes[labelled.labels[row]],
      predictions=tuple((labelled.classes[c], float(p)) for c, p in zip(best[row], probability[row], strict=True)),
      correct=bool(best[row, 0] == labelled.labels[row]),
    )
    for row in chosen
  )


def _worst_confusions(labelled: LabelledSet, predicted, probability, *, count: int) -> tuple[Confusion, ...]:
  wrong = np.flatnonzero(predicted != labelled.labels)
  if not len(wrong):
    return ()
  pairs, position, counts = np.unique(
    np.stack([labelled.labels[wrong], predicted[wrong]], axis=1), axis=0, return_inverse=True, return_counts=True
  )
  # The most confident image of each pair is the first met in this order.
  by_confidence = np.argsort(-probability[wrong], kind="stable")
  _, first = np.unique(position[by_confidence], return_index=True)
  speaker = wrong[by_confidence[first]]
  worst = np.lexsort((-probability[speaker], -counts))[:count]
  found = []
  for pair in worst:
    truth, taken_for = pairs[pair]
    others = np.flatnonzero(labelled.labels == taken_for)
    found.append(
      Confusion(
        truth=labelled.classes[truth],
        predicted=labelled.classes[taken_for],
        image=thumbnail(labelled.images[int(speaker[pair])]),
        predicted_image=thumbnail(labelled.images[int(others[0])]) if len(others) else None,
        count=int(counts[pair]),
        probability=float(probability[speaker[pair]]),
      )
    )
  return tuple(found)
