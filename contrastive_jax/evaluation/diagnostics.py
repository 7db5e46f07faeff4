"""Diagnostics of embeddings beyond the score of a task: how they spread, how close pairs lie, what divides the towers.

All functions run on the host and add up in float64; none holds the products of everything with everything.
"""

import numpy as np
from jaxtyping import Array, Float, Int

from contrastive_jax.evaluation.arrays import checked
from contrastive_jax.evaluation.calibration import global_auc

Embeddings = Float[Array | np.ndarray, "rows dim"]
Groups = Int[Array | np.ndarray, "rows"]

# Rows of a side that `pair_diagnostics` looks at where it looks at all products: a fraction of a second.
ROWS_COMPARED = 2048
# Rows of a side of which a fifth is one to test on.
MIN_ROWS = 5
# Newton's method converges quadratically; where a step overshoots, it is halved.
NEWTON_STEPS, HALVINGS = 30, 20


@checked
def alignment(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  image_group: Int[Array | np.ndarray, "images"],
  text_group: Int[Array | np.ndarray, "texts"],
) -> float:
  """Computes the mean squared distance between images and texts that belong together: 0 to 4 for unit vectors.

  Args:
    image: embeddings of the images.
    text: embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.

  Raises:
    ValueError: if nothing belongs together.

  Wang and Isola (arXiv 2005.10242), section 4.1, between the towers as in arXiv 2405.18570.

  Examples:
    >>> east, north = np.float32([[1, 0]]), np.float32([[0, 1]])
    >>> alignment(east, north, np.array([7]), np.array([7]))
    2.0
  """
  groups, position = np.unique(np.concatenate([np.asarray(image_group), np.asarray(text_group)]), return_inverse=True)
  sides = []
  for rows, where in ((image, position[: len(image)]), (text, position[len(image) :])):
    rows = np.asarray(rows, np.float64)
    count = np.bincount(where, minlength=len(groups))
    total = np.zeros((len(groups), rows.shape[1]))
    np.add.at(total, where, rows)
    sides.append((count, total, np.bincount(where, np.sum(rows**2, axis=1), minlength=len(groups))))
  (images, image_sum, image_square), (texts, text_sum, text_square) = sides
  pairs = np.sum(images * texts)
  if not pairs:
    raise ValueError(f"none of {len(image)} images belongs with any of {len(text)} texts")
  # Over all pairs of a group, the sum of |i - t|^2 needs nothing but the sums of each side.
  return float(np.sum(texts * image_square + images * text_square - 2 * np.sum(image_sum * text_sum, axis=1)) / pairs)


@checked
def uniformity(embeddings: Embeddings, *, t: float = 2.0, block: int = 1024) -> float:
  """Computes `log mean exp(-t |x - y|^2)` over the pairs of different rows: 0 where all are equal, else lower.

  Args:
    embeddings: L2-normalised embeddings, at least two rows.
    t: sharpness of the kernel.
    block: number of rows that are compared with all others at once.

  Wang and Isola (arXiv 2005.10242), equation for L_uniform; the diagonal is left out.

  Examples:
    >>> uniformity(np.float32([[1, 0], [-1, 0]])), uniformity(np.float32([[1, 0], [1, 0]]))
    (-8.0, 0.0)
  """
  rows = np.asarray(embeddings)
  number = np.arange(len(rows))
  return _log_mean(rows, rows, number, number, t, block)


@checked
def cross_uniformity(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  image_group: Int[Array | np.ndarray, "images"],
  text_group: Int[Array | np.ndarray, "texts"],
  *,
  t: float = 2.0,
  block: int = 1024,
) -> float:
  """Computes `log mean exp(-t |image - text|^2)` over the images and texts that do not belong together.

  Args:
    image: L2-normalised embeddings of the images.
    text: L2-normalised embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.
    t: sharpness of the kernel.
    block: number of images that are compared with all texts at once.

  It is L_xunif of arXiv 2405.18570.

  Examples:
    >>> both = np.float32([[1, 0], [-1, 0]])
    >>> cross_uniformity(both, both, np.arange(2), np.arange(2))
    -8.0
  """
  return _log_mean(np.asarray(image), np.asarray(text), np.asarray(image_group), np.asarray(text_group), t, block)


def _log_mean(one, other, one_group, other_group, t: float, block: int) -> float:
  square = np.sum(np.square(other, dtype=np.float64), axis=1)
  total, count = 0.0, 0
  for start in range(0, len(one), block):
    some = one[start : start + block]
    distance = np.sum(np.square(some, dtype=np.float64), axis=1)[:, None] + square - 2 * (some @ other.T)
    apart = one_group[start : start + block, None] != other_group
    total += np.sum(np.exp(-t * np.maximum(distance, 0)), where=apart)
    count += np.count_nonzero(apart)
  if not count:
    raise ValueError(f"uniformity needs rows that do not belong together, all of {len(one)} x {len(other)} do")
  return float(np.log(total / count))


@checked
def effective_rank(embeddings: Embeddings) -> float:
  """Computes the exponential of the entropy of the covariance's eigenvalues: the number of directions that are used.

  Args:
    embeddings: the embeddings, at least one row.

  Returns:
    1 to the number of features; 0 where all rows are equal.

  Roy and Vetterli, "The Effective Rank" (2007), of the covariance.

  Examples:
    >>> square = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1]])
    >>> round(effective_rank(square), 6), round(effective_rank(square[:2]), 6), effective_rank(square[:1])
    (2.0, 1.0, 0.0)
  """
  rows = np.asarray(embeddings, np.float64)
  centred = rows - rows.mean(axis=0)
  values = np.maximum(np.linalg.eigvalsh(centred.T @ centred), 0)
  # What rounding leaves of equal rows is no direction.
  if values.sum() <= np.finfo(np.float32).eps ** 2 * np.sum(rows**2):
    return 0.0
  shares = values[values > 0] / values.sum()
  return float(np.exp(-np.sum(shares * np.log(shares))))


@checked
def tolerance(embeddings: Embeddings, labels: Groups) -> float:
  """Averages, over all pairs of rows, their inner product where they share a class, and 0 where they do not.

  Args:
    embeddings: L2-normalised embeddings. A row is paired with itself, too.
    labels: the class of each row.

  Returns:
    1/C where all rows of C equally large classes are equal; lower, the more a class is scattered.

  Wang and Liu (arXiv 2012.09740), section 4.3.

  Examples:
    >>> tolerance(np.float32([[1, 0], [1, 0], [0, 1], [0, 1]]), np.array([0, 0, 1, 1]))
    0.5
  """
  classes, position = np.unique(np.asarray(labels), return_inverse=True)
  total = np.zeros((len(classes), embeddings.shape[1]))
  np.add.at(total, position, np.asarray(embeddings, np.float64))
  return float(np.sum(total**2) / len(embeddings) ** 2)


@checked
def modality_gap(image: Float[Array | np.ndarray, "images dim"], text: Float[Array | np.ndarray, "texts dim"]) -> float:
  """Computes the distance between the mean of the images and the mean of the texts: 0 to 2 for unit vectors.

  Args:
    image: embeddings of the images.
    text: embeddings of the texts.

  Raises:
    ValueError: if a side has no rows.

  Liang et al. (arXiv 2203.02053), section 2.

  Examples:
    >>> modality_gap(np.float32([[1, 0]]), np.float32([[-1, 0]]))
    2.0
  """
  if not len(image) or not len(text):
    raise ValueError(f"a modality gap needs images and texts, got {len(image)} and {len(text)}")
  means = [np.mean(np.asarray(rows), axis=0, dtype=np.float64) for rows in (image, text)]
  return float(np.linalg.norm(means[0] - means[1]))


@checked
def modality_separability(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  *,
  most: int = 8192,
  seed: int = 0,
) -> float:
  """Measures how often a linear classifier tells apart images and texts that it has not seen.

  Args:
    image: embeddings of the images.
    text: embeddings of the texts.
    most: bound of the images, and of the texts, that are drawn; as many of each, of which 80% are to train on.
    seed: seed of the draw.

  Returns:
    A share: 0.5 where the gap between the modalities is closed, 1 where they are disjoint.

  Raises:
    ValueError: if a side has fewer than `MIN_ROWS` rows.

  It is the "linear separability" of arXiv 2405.18570, by logistic regression with an L2 penalty of 1/2 on the weights.
  """
  count = min(len(image), len(text), most)
  if count < MIN_ROWS:
    raise ValueError(f"separability needs {MIN_ROWS} images and as many texts, got {len(image)} and {len(text)}")
  train = count * 4 // 5
  drawn = []
  for number, rows in enumerate((image, text)):
    order = np.random.default_rng((seed, number)).permutation(len(rows))[:count]
    drawn.append(np.asarray(rows)[order].astype(np.float64))
  features = np.concatenate([rows[:train] for rows in drawn])
  weights = _logistic(features, np.repeat([-1.0, 1.0], train))
  scores = [rows[train:] @ weights[:-1] + weights[-1] for rows in drawn]
  return float((np.mean(scores[0] < 0) + np.mean(scores[1] > 0)) / 2)


def _logistic(features, sign) -> np.ndarray:
  """Finds the weights and, last, the unpenalised bias that minimise the logistic loss plus |weights|^2 / 2."""
  rows = np.concatenate([features, np.ones((len(features), 1))], axis=1)
  penalty = np.append(np.ones(features.shape[1]), 0.0)

  def loss(weights):
    return np.sum(np.logaddexp(0, -sign * (rows @ weights))) + np.sum(penalty * weights**2) / 2

  weights = np.zeros(rows.shape[1])
  for _ in range(NEWTON_STEPS):
    wrong = 1 / (1 + np.exp(np.minimum(sign * (rows @ weights), 500)))
    gradient = rows.T @ (-sign * wrong) + penalty * weights
    if np.abs(gradient).max() < 1e-9 * len(rows):
      break
    curvature = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + np.diag(penalty + 1e-12)
    step = np.linalg.solve(curvature, gradient)
    before = loss(weights)
    for halving in range(HALVINGS):
      proposed = weights - step / 2**halving
      if loss(proposed) <= before:
        weights = proposed
        break
  return weights


def drawn_rows(images: int, texts: int, *, most: int = ROWS_COMPARED, seed: int = 0) -> list[Int[np.ndarray, "_"]]:
  """Draws the rows of both sides that are looked at where all products are, at most `most` of each, ascending.

  Examples:
    >>> [rows.tolist() for rows in drawn_rows(3, 2)]
    [[0, 1, 2], [0, 1]]
  """
  rng = np.random.default_rng(seed)
  return [np.sort(rng.permutation(rows)[:most]) for rows in (images, texts)]


@checked
def pair_diagnostics(
  image: Float[np.ndarray, "images dim"],
  text: Float[np.ndarray, "texts dim"],
  image_group: Int[np.ndarray, "images"],
  text_group: Int[np.ndarray, "texts"],
  *,
  thorough: bool = False,
  most: int = ROWS_COMPARED,
  seed: int = 0,
) -> dict[str, float]:
  """Computes the diagnostics of a set of pairs, by the names that results use.

  Args:
    image: L2-normalised embeddings of the images.
    text: L2-normalised embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.
    thorough: whether to add those that take too long during training, global_auc and modality_separability.
    most: bound of the images and of the texts, drawn at random, whose uniformity is computed.
    seed: seed of the draw.

  Returns:
    alignment and modality_gap of all rows; uniformity_image, uniformity_text, uniformity_cross, rank_image and
    rank_text of those drawn. A measure that needs several rows, or two groups, is absent where there are none.
  """
  found = {"alignment": alignment(image, text, image_group, text_group), "modality_gap": modality_gap(image, text)}
  i, t = drawn_rows(len(image), len(text), most=most, seed=seed)
  if len(i) > 1:
    found["uniformity_image"] = uniformity(image[i])
    found["rank_image"] = effective_rank(image[i])
  if len(t) > 1:
    found["uniformity_text"] = uniformity(text[t])
    found["rank_text"] = effective_rank(text[t])
  if len(np.union1d(image_group[i], text_group[t])) > 1:
    found["uniformity_cross"] = cross_uniformity(image[i], text[t], image_group[i], text_group[t])
  if thorough and len(np.union1d(image_group, text_group)) > 1:
    found["global_auc"] = global_auc(image, text, image_group, text_group)
  if thorough and min(len(image), len(text)) >= MIN_ROWS:
    found["modality_separability"] = modality_separability(image, text, seed=seed)
  return found
