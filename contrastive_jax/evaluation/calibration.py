"""Calibration: whether one threshold serves all queries, and whether probabilities come true."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.evaluation.arrays import checked


@checked
def global_auc(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  image_group: Int[Array | np.ndarray, "images"],
  text_group: Int[Array | np.ndarray, "texts"],
  *,
  block: int = 1024,
) -> float:
  """Computes how often an image and a text that belong together score above two that do not; ties count half.

  Recall compares scores within a query; this asks for one threshold that serves all queries. It is exact: the scores of
  all images with all texts are computed twice, a block at a time.

  Args:
    image: embeddings of the images; the score is the inner product.
    text: embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.
    block: number of images that are scored at once. Peak memory is a few times block x texts, and the scores of all
      that belong together.

  Returns:
    A share of the pairs of pairs: 0.5 by chance, 1 where one threshold divides them.

  Raises:
    ValueError: if nothing belongs together, or everything does.

  It is the area under the ROC curve as Mann and Whitney's U, over the pairs of all queries together.

  Examples:
    >>> image = text = np.eye(3, dtype=np.float32)
    >>> group = np.arange(3)
    >>> global_auc(image, text, group, group), global_auc(image, text, group, np.roll(group, 1))
    (1.0, 0.25)
  """
  image, text = np.asarray(image), np.asarray(text)
  image_group, text_group = np.asarray(image_group), np.asarray(text_group)

  def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(image), block):
      scores = image[start : start + block] @ text.T
      yield scores, image_group[start : start + block, None] == text_group

  matching = np.sort(np.concatenate([scores[together] for scores, together in blocks()]))
  others = len(image) * len(text) - len(matching)
  if not len(matching) or not others:
    raise ValueError(
      f"AUC needs pairs that belong together and pairs that do not, got {len(matching)} and {others} of"
      f" {len(image)} images and {len(text)} texts"
    )
  wins = 0  # Twice the number of pairs of pairs in the right order: an integer, so nothing is rounded.
  for scores, together in blocks():
    below = np.sort(scores[~together])
    for side in ("left", "right"):
      wins += int(np.sum(np.searchsorted(below, matching, side), dtype=np.int64))
  return wins / (2 * len(matching) * others)


@checked
def expected_calibration_error(
  confidence: Float[np.ndarray, "images"], correct: Bool[np.ndarray, "images"], *, bins: int = 15
) -> float:
  """Computes the mean distance between how sure the model is and how often it is right, over bins of equal width.

  Args:
    confidence: probability of the predicted class of each image.
    correct: whether the predicted class is the right one.
    bins: number of the intervals (0, 1/bins], (1/bins, 2/bins], ...

  Returns:
    0 where every bin is as often right as it is sure, 1 at most.

  Raises:
    ValueError: if there are no images, or a confidence is no probability.

  Guo et al. (arXiv 1706.04599), equation 3.

  Examples:
    >>> sure = np.full(4, 0.75)
    >>> expected_calibration_error(sure, np.array([True, True, True, False]))
    0.0
    >>> expected_calibration_error(sure, np.array([True, False, False, False]))
    0.5
  """
  confidence = np.asarray(confidence, np.float64)
  # Softmax in float32 may exceed 1 by its rounding, which a large scale multiplies.
  if not len(confidence) or confidence.min() < 0 or confidence.max() > 1.1:
    said = f"from {confidence.min()} to {confidence.max()}" if len(confidence) else "of no image"
    raise ValueError(f"calibration compares probabilities from 0 to 1 with hits, got confidences {said}")
  place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gap = np.bincount(place, confidence, minlength=bins) - np.bincount(place, correct, minlength=bins)
  return float(np.sum(np.abs(gap)) / len(confidence))
