"""Probes of frozen features: a linear classifier that is trained on them, and their nearest neighbours.

The functions take the features of `Model.encode_image`, or those before its projection, which often know more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.arrays import checked, require_below
from contrastive_jax.evaluation.retrieval import top_k
from contrastive_jax.evaluation.zero_shot import balanced_accuracy

# CLIP_benchmark's sweep of the weight decay: every 16th of these, then around the best with halved strides.
WEIGHT_DECAYS = np.logspace(-6, 2, num=97)
FIRST_STRIDE = 16
# Test rows that vote at once.
TEST_BLOCK = 1024

Features = Float[Array | np.ndarray, "train dim"]
Labels = Int[Array | np.ndarray, "train"]
Tested = Float[Array | np.ndarray, "test dim"]
TestedLabels = Int[Array | np.ndarray, "test"]


@checked
def few_shot(labels: Labels, k: int, *, seed: int = 0) -> Int[np.ndarray, "chosen"]:
  """Draws `k` rows of each class that occurs, at random, and returns their indices in ascending order.

  Args:
    labels: the class of each row.
    k: number of rows of each class.
    seed: seed of the draw; the rows of a class do not depend on the other classes.

  Raises:
    UserError: if a class has fewer rows, or there is no label, or one below 0.
  """
  if k < 1 or not len(labels) or labels.min() < 0:
    least = f"{len(labels)} labels" + (f" from {labels.min()} on" if len(labels) else "")
    raise UserError(f"{k} samples of each class of {least}: ask for at least one, of classes numbered from 0")
  chosen = []
  for label in np.unique(labels):
    rows = np.flatnonzero(labels == label)
    if len(rows) < k:
      raise UserError(f"{k} samples of each class are asked for, class {label} has {len(rows)}: ask for no more")
    chosen.append(np.random.default_rng((seed, int(label))).permutation(rows)[:k])
  return np.sort(np.concatenate(chosen))


@checked
def linear_probe(
  train: Features,
  train_labels: Labels,
  test: Tested,
  test_labels: TestedLabels,
  *,
  classes: int,
  weight_decay: float = 0.0,
  learning_rate: float = 0.1,
  epochs: int = 10,
  batch_size: int = 64,
  seed: int = 0,
) -> dict[str, float]:
  """Trains a linear classifier on frozen features and returns its accuracy.

  Args:
    train: the features to learn from. Only their direction counts, since they are L2-normalised here.
    train_labels: the class of each of them, below `classes`.
    test: the features to classify.
    test_labels: the class of each of them.
    classes: number of classes.
    weight_decay: decoupled weight decay of weights and bias, which `best_weight_decay` can choose.
    learning_rate: learning rate at the first step; a cosine takes it to zero.
    epochs: number of passes over `train`, each in an order of its own.
    batch_size: number of rows of a step; the last of an epoch may have fewer.
    seed: seed of the first weights and of the orders.

  Returns:
    The metrics lp_acc1, lp_acc5 (absent under 5 classes) and lp_mean_per_class_recall.

  Follows CLIP_benchmark's linear_probe: cross-entropy, AdamW.
  """
  _check_rows(train_labels, test_labels, classes)
  first = initial_weights(train.shape[1], classes, seed)
  order = batches(len(train), epochs, batch_size, seed)
  fit = fit_linear(normalised(train), jnp.asarray(train_labels), first, order, learning_rate, weight_decay)
  return _accuracies(_best(normalised(test), fit), test_labels, "lp")


@checked
def best_weight_decay(
  train: Features,
  train_labels: Labels,
  validation: Tested,
  validation_labels: TestedLabels,
  *,
  classes: int,
  learning_rate: float = 0.1,
  epochs: int = 10,
  batch_size: int = 64,
  seed: int = 0,
) -> float:
  """Finds the weight decay with which `linear_probe` is most often right on rows kept for choosing it.

  Seven values from 1e-6 to 100 are tried first, then ever nearer neighbours of the best, as in CLIP (Radford et al.
  2021, appendix A.3) and CLIP_benchmark; the values of a round are trained together.

  Args:
    train: the features to learn from.
    train_labels: the class of each of them, below `classes`.
    validation: the features to choose by, which are not those of the final test.
    validation_labels: the class of each of them.
    classes: number of classes.
    learning_rate: learning rate at the first step; a cosine takes it to zero.
    epochs: number of passes over `train`.
    batch_size: number of rows of a step.
    seed: seed of the first weights and of the orders.

  Returns:
    One of `WEIGHT_DECAYS`.
  """
  _check_rows(train_labels, validation_labels, classes, "validation_labels")
  first = initial_weights(train.shape[1], classes, seed)
  order = batches(len(train), epochs, batch_size, seed)
  train, validation = normalised(train), normalised(validation)
  labels = jnp.asarray(train_labels)

  def peak(tried: list[int]) -> int:
    fits = _fit_several(train, labels, first, order, learning_rate, jnp.asarray(WEIGHT_DECAYS[tried], train.dtype))
    right = [
      np.mean(_best(validation, jax.tree.map(lambda leaf, n=n: leaf[n], fits))[:, 0] == validation_labels)
      for n in range(len(tried))
    ]
    return tried[int(np.argmax(right))]

  best = peak(list(range(0, len(WEIGHT_DECAYS), FIRST_STRIDE)))
  stride = FIRST_STRIDE // 2
  while stride:
    best = peak([max(best - stride, 0), best, min(best + stride, len(WEIGHT_DECAYS) - 1)])
    stride //= 2
  return float(WEIGHT_DECAYS[best])


@checked
def knn_probe(
  train: Features,
  train_labels: Labels,
  test: Tested,
  test_labels: TestedLabels,
  *,
  classes: int,
  k: int = 20,
  temperature: float = 0.07,
  block: int = 4096,
) -> dict[str, float]:
  """Classifies by a vote of the nearest training rows, and returns the accuracy; nothing is trained.

  Args:
    train: the features that vote, which are L2-normalised here.
    train_labels: the class of each of them, below `classes`.
    test: the features to classify.
    test_labels: the class of each of them.
    classes: number of classes.
    k: number of neighbours that vote; all rows where there are fewer.
    temperature: temperature of the votes, which are exp(cosine / temperature).
    block: number of rows that are scored at once, as in `retrieval.top_k`.

  Returns:
    The metrics knn_acc1, knn_acc5 (absent under 5 classes) and knn_mean_per_class_recall.

  It follows the rule of Wu et al. (arXiv 1805.01978) with DINO's k and temperature (arXiv 2104.14294).
  """
  _check_rows(train_labels, test_labels, classes)
  nearest, cosine = top_k(normalised(test), normalised(train), k=min(k, len(train)), block=block)
  voters = np.asarray(train_labels)[nearest]
  ranked = np.zeros((len(test), min(5, classes)), np.int64)
  for start in range(0, len(test), TEST_BLOCK):
    some = voters[start : start + TEST_BLOCK]
    votes = np.exp(cosine[start : start + TEST_BLOCK].astype(np.float64) / temperature)
    place = np.arange(len(some))[:, None] * classes + some
    total = np.bincount(place.ravel(), votes.ravel(), minlength=len(some) * classes).reshape(len(some), classes)
    ranked[start : start + TEST_BLOCK] = np.argsort(-total, axis=1, kind="stable")[:, : ranked.shape[1]]
  return _accuracies(ranked, test_labels, "knn")


def normalised(features: Float[Array | np.ndarray, "rows dim"]) -> Float[Array, "rows dim"]:
  """Divides rows by their length; a row of zeros stays.

  Examples:
    >>> normalised(np.float32([[3, 4], [0, 0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
  """
  features = jnp.asarray(features)
  length = jnp.linalg.norm(features, axis=1, keepdims=True)
  return features / jnp.maximum(length, jnp.finfo(features.dtype).tiny)


def initial_weights(dim: int, classes: int, seed: int) -> dict[str, jax.Array]:
  """Draws weights and bias uniformly within 1 / sqrt(dim), as `torch.nn.Linear` does.

  Args:
    dim: size of the features.
    classes: number of classes.
    seed: seed of the draw.

  Returns:
    {"weight": `[dim, classes]`, "bias": `[classes]`}, float32.
  """
  keys = jax.random.split(jax.random.key(seed))
  shapes = {"weight": (dim, classes), "bias": (classes,)}
  bound = dim**-0.5
  return {
    name: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def batches(rows: int, epochs: int, batch_size: int, seed: int) -> Int[np.ndarray, "steps batch"]:
  """Orders the rows of each step, every epoch anew; the index is -1 where an epoch's last batch has fewer rows.

  Args:
    rows: number of rows.
    epochs: number of passes over them.
    batch_size: number of rows of a step.
    seed: seed of the orders.
  """
  orders = [np.random.default_rng((seed, epoch)).permutation(rows) for epoch in range(epochs)]
  padded = np.pad(np.stack(orders).astype(np.int32), ((0, 0), (0, -rows % batch_size)), constant_values=-1)
  return padded.reshape(-1, batch_size)


def _check_rows(train: np.ndarray, test: np.ndarray, classes: int, tested: str = "test_labels") -> None:
  for field, labels in (("train_labels", train), (tested, test)):
    if not len(labels):
      raise UserError(f"{field} is empty: a probe needs rows to learn from and rows to be scored on")
    require_below(labels, classes, field)


@jax.jit
def fit_linear(
  features: Float[Array, "train dim"],
  labels: Int[Array, "train"],
  first: PyTree[Float[Array, "..."]],
  order: Int[Array | np.ndarray, "steps batch"],
  learning_rate: float | Float[Array, ""],
  weight_decay: float | Float[Array, ""],
) -> PyTree[Float[Array, "..."]]:
  """Trains a linear classifier by cross-entropy with AdamW and a cosine schedule.

  Args:
    features: the L2-normalised features.
    labels: the class of each of them.
    first: the first weights, {"weight": `[dim, classes]`, "bias": `[classes]`}.
    order: the rows of each step, as `batches` orders them.
    learning_rate: learning rate at the first step.
    weight_decay: weight decay of weights and bias.

  Returns:
    The weights after the last step, in a dict like `first`.
  """

  def loss(linear, rows):
    logits = jnp.matmul(features[rows], linear["weight"], precision=jax.lax.Precision.HIGHEST) + linear["bias"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    return jnp.mean(each, where=rows >= 0)

  optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, len(order)), weight_decay=weight_decay)

  def step(carry, rows):
    linear, state = carry
    updates, state = optimizer.update(jax.grad(loss)(linear, rows), state, linear)
    return (optax.apply_updates(linear, updates), state), None

  return jax.lax.scan(step, (first, optimizer.init(first)), jnp.asarray(order))[0][0]


_fit_several = jax.jit(jax.vmap(fit_linear, in_axes=(None, None, None, None, None, 0)))


@functools.partial(jax.jit, static_argnames="k")
def _top(features, linear, k: int):
  scores = jnp.matmul(features, linear["weight"], precision=jax.lax.Precision.HIGHEST) + linear["bias"]
  return jax.lax.top_k(scores, k)[1]


def _best(features, linear) -> np.ndarray:
  """Finds the five highest classes of each row, or as many as there are."""
  return np.asarray(_top(features, linear, k=min(5, len(linear["bias"]))))


def _accuracies(ranked, labels, prefix: str) -> dict[str, float]:
  labels = np.asarray(labels)
  hit = ranked == labels[:, None]
  found = {f"{prefix}_acc1": float(np.mean(hit[:, 0]))}
  if ranked.shape[1] == 5:
    found[f"{prefix}_acc5"] = float(np.mean(hit.any(axis=1)))
  found[f"{prefix}_mean_per_class_recall"] = balanced_accuracy(ranked[:, 0], labels)
  return found
