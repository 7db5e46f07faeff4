"""Where the gradient of a softmax loss would go: how much of it to the positives, and to how many negatives."""

import math

import numpy as np
from jaxtyping import Array, Float, Int

from contrastive_jax.evaluation.arrays import checked

# Share of the negatives that count as the hardest.
HARDEST = 0.01


@checked
def gradient_weights(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  image_group: Int[Array | np.ndarray, "images"],
  text_group: Int[Array | np.ndarray, "texts"],
  *,
  logit_scale: float,
  block: int = 1024,
) -> dict[str, float]:
  """Computes with which weights a softmax loss would pull and push the texts of each image, on average.

  Args:
    image: L2-normalised embeddings of the images.
    text: L2-normalised embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.
    logit_scale: multiplier of the similarities.
    block: number of images that are compared with all texts at once.

  Returns:
    effective_negatives: the exponential of the entropy of the weights that an image's negatives have among themselves:
      all of them where every one is pushed equally, 1 where a single one is.
    weight_of_hardest: the share of these weights that the most similar hundredth of the negatives has, at least one.
    weight_of_positive: one minus the probability of the texts that belong to the image, which is the weight of the pull
      and of all pushes together. Only images with such a text count; without any it is absent.
    Nothing where no image has a negative.

  Wang and Liu, "Understanding the Behaviour of Contrastive Loss" (arXiv 2012.09740), section 3.

  Examples:
    >>> both, group = np.eye(3, dtype=np.float32), np.arange(3)
    >>> {name: round(value, 3) for name, value in gradient_weights(both, both, group, group, logit_scale=1.0).items()}
    {'effective_negatives': 2.0, 'weight_of_hardest': 0.5, 'weight_of_positive': 0.424}
  """
  image, text = (np.asarray(side, np.float64) for side in (image, text))
  found: dict[str, list[float]] = {"effective_negatives": [], "weight_of_hardest": [], "weight_of_positive": []}
  for start in range(0, len(image), block):
    logits = logit_scale * image[start : start + block] @ text.T
    together = np.asarray(image_group)[start : start + block, None] == np.asarray(text_group)
    for row, own in zip(logits, together, strict=True):
      negatives = np.sort(row[~own])[::-1]
      if not len(negatives):
        continue
      weights = np.exp(negatives - negatives[0])
      total = weights.sum()
      # The entropy of weights w / total is log(total) less their mean logarithm.
      entropy = math.log(total) - np.sum(weights * (negatives - negatives[0])) / total
      found["effective_negatives"].append(math.exp(entropy))
      found["weight_of_hardest"].append(weights[: math.ceil(HARDEST * len(weights))].sum() / total)
      if own.any():
        pull = np.logaddexp.reduce(row[own]) - (math.log(total) + negatives[0])
        found["weight_of_positive"].append(1 / (1 + np.exp(np.clip(pull, -700, 700))))
  return {name: float(np.mean(values)) for name, values in found.items() if values}
