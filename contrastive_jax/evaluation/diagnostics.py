"""What embeddings look like beyond the score of a task: how they spread, how close pairs lie, what divides the towers.

All run on the host and add up in float64; none holds the products of everything with everything.
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
  """Mean squared distance between an image and a text that belong together: 0 to 4 for unit vectors.

  Args:
    image: embeddings.
    text: embeddings.
    image_group: an image and a text belong together when their groups are equal.
    text_group: see `image_group`.

  Raises:
    ValueError: if nothing belongs together.

  Wang and Isola (arXiv 2005.10242), section 4.1, between the towers as in arXiv 2405.18570.
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
  """`log mean exp(-t |x - y|^2)` over the pairs of different rows: 0 where all are equal, lower where they spread.

  Args:
    embeddings: L2-normalised, at least two rows.
    t: sharpness.
    block: rows compared with all others at once.

  Wang and Isola (arXiv 2005.10242), equation for L_uniform; the diagonal is left out.
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
  """`log mean exp(-t |i - t|^2)` over the images and texts that do not belong together.

  Args:
    image: L2-normalised embeddings.
    text: L2-normalised embeddings.
    image_group: an image and a text belong together when their groups are equal.
    text_group: see `image_group`.
    t: sharpness.
    block: images compared with all texts at once.

  L_xunif of arXiv 2405.18570.
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
def tolerance(embeddings: Embeddings, labels: Groups) -> float:
  """Mean over all pairs of rows, a row with itself included, of their inner product where they share a class, else 0.

  Args:
    embeddings: L2-normalised.
    labels: the class of each row.

  Returns:
    1/C where all rows of C equally large classes are equal; lower, the more a class is scattered.

  Wang and Liu (arXiv 2012.09740), section 4.3.
  """
  classes, position = np.unique(np.asarray(labels), return_inverse=True)
  total = np.zeros((len(classes), embeddings.shape[1]))
  np.add.at(total, position, np.asarray(embeddings, np.float64))
  return float(np.sum(total**2) / len(embeddings) ** 2)


@checked
def modality_gap(image: Float[Array | np.ndarray, "images dim"], text: Float[Array | np.ndarray, "texts dim"]) -> float:
  """Distance between the mean of the images and the mean of the texts: 0 to 2 for unit vectors.

  Raises:
    ValueError: if a side has no rows.

  Liang et al. (arXiv 2203.02053), section 2.
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
  """How often a linear classifier tells an image from a text that it has not seen: 0.5 is closed, 1 is disjoint.

  Args:
    image: embeddings.
    text: embeddings.
    most: images, and as many texts, are drawn: no more than this, or than the smaller side has. 80% are to train on.
    seed: of the draw.

  Raises:
    ValueError: if a side has fewer than `MIN_ROWS` rows.

  The "linear separability" of arXiv 2405.18570; logistic regression with an L2 penalty of 1/2 on the weights.
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
  """Weights and, last, the unpenalised bias that minimise the logistic loss of the signs plus |weights|^2 / 2."""
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
  """What can be said of the embeddings of a set of pairs, by the names that results use.

  Args:
    image: L2-normalised embeddings.
    text: L2-normalised embeddings.
    image_group: an image and a text belong together when their groups are equal.
    text_group: see `image_group`.
    thorough: also what is too dear during training, global_auc and modality_separability.
    most: uniformity is that of at most so many images and texts, drawn at random.
    seed: of the draw.

  Returns:
    alignment and modality_gap of all rows; uniformity_image, uniformity_text and uniformity_cross of those drawn.
    What needs several rows, or two groups, is absent where there are none.
  """
  found = {"alignment": alignment(image, text, image_group, text_group), "modality_gap": modality_gap(image, text)}
  rng = np.random.default_rng(seed)
  i, t = (np.sort(rng.permutation(len(rows))[:most]) for rows in (image, text))
  if len(i) > 1:
    found["uniformity_image"] = uniformity(image[i])
  if len(t) > 1:
    found["uniformity_text"] = uniformity(text[t])
  if len(np.union1d(image_group[i], text_group[t])) > 1:
    found["uniformity_cross"] = cross_uniformity(image[i], text[t], image_group[i], text_group[t])
  if thorough and len(np.union1d(image_group, text_group)) > 1:
    found["global_auc"] = global_auc(image, text, image_group, text_group)
  if thorough and min(len(image), len(text)) >= MIN_ROWS:
    found["modality_separability"] = modality_separability(image, text, seed=seed)
  return found
