"""Zero-shot classification where an image shows several things: each class ranks the images.

Numbers agree with CLIP_benchmark's on its multi-label sets, such as voc2007_multilabel.
"""

import numpy as np
from jaxtyping import Array, Bool, Float

from contrastive_jax.evaluation.arrays import checked
from contrastive_jax.evaluation.results import Result
from contrastive_jax.evaluation.tasks import Encoder, MultiLabelSet, kind_of
from contrastive_jax.evaluation.zero_shot import classifier


@checked
def average_precision(
  scores: Float[Array | np.ndarray, "images classes"], labels: Bool[Array | np.ndarray, "images classes"]
) -> Float[np.ndarray, "classes"]:
  """Computes for each class the mean, over the images that show it, of the precision down to that image.

  Args:
    scores: the score of each class for each image; the higher, the likelier the image shows the class.
    labels: whether the image shows the class.

  Returns:
    The average precision of each class, 0 for a class that no image shows.

  Follows CLIP_benchmark's average_precision_per_class: every positive counts by itself, nothing is interpolated. Equal
  scores rank by index, which torch.sort does not promise.

  Examples:
    >>> scores = np.float32([[0.9], [0.5], [0.1]])
    >>> average_precision(scores, np.array([[True], [False], [True]])).tolist()  # The mean of 1/1 and 2/3.
    [0.8333333333333333]
  """
  order = np.argsort(-np.asarray(scores), axis=0, kind="stable")
  shown = np.take_along_axis(np.asarray(labels), order, axis=0)
  precision = np.cumsum(shown, axis=0) / np.arange(1, len(shown) + 1)[:, None]
  return np.sum(precision, axis=0, where=shown) / np.maximum(np.sum(shown, axis=0), 1)


def evaluate_multilabel(model: Encoder, scored: MultiLabelSet) -> Result:
  """Scores a multi-label set without training on it.

  Args:
    model: the model, which embeds images and prompts.
    scored: the set; its images are read a batch at a time. Embeddings are kept, and the scores of all images for all
      classes.

  Returns:
    The metric mean_average_precision, in which classes without an image count 0, as in CLIP_benchmark.
  """
  if not len(scored.images):
    raise ValueError(f"{scored.name} has no images to evaluate on")
  weights = classifier(model, scored.classes, scored.templates)
  precision = average_precision(model.encode_image(scored.images) @ weights.T, scored.labels)
  return Result(
    dataset=scored.name,
    task="zeroshot_classification",
    metrics={"mean_average_precision": float(np.mean(precision))},
    language=scored.language,
    sizes={kind_of(scored.images): len(scored.images), "classes": len(scored.classes)},
  )
