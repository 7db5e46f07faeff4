"""Where the gradient of a softmax loss would go: how much of it to the positives, and to how many negatives."""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.evaluation.arrays import checked

# Share of the negatives that count as the hardest.
HARDEST = 0.01
# Width of the intervals of similarity that a profile counts in.
WIDTH = 0.02
_INTERVALS = round(2 / WIDTH)


@dataclasses.dataclass(frozen=True, eq=False)
class GradientProfile:
  """Shares of the gradient of a softmax loss by the similarity of an image and a text, each adding up to 1.

  Attributes:
    similarities: the middle of each interval of similarity, ascending.
    push: the share of the weights of negatives that lies in each.
    pull: the share of the weights of positives.
    negatives: the share of the negatives themselves.
  """

  similarities: Float[np.ndarray, "intervals"]
  push: Float[np.ndarray, "intervals"]
  pull: Float[np.ndarray, "intervals"]
  negatives: Float[np.ndarray, "intervals"]


@checked
def softmax_gradient(
  image: Float[Array | np.ndarray, "images dim"],
  text: Float[Array | np.ndarray, "texts dim"],
  image_group: Int[Array | np.ndarray, "images"],
  text_group: Int[Array | np.ndarray, "texts"],
  *,
  logit_scale: float,
  block: int = 1024,
) -> tuple[dict[str, float], GradientProfile | None]:
  """Computes with which weights a softmax loss would pull and push the texts of each image.

  Args:
    image: L2-normalised embeddings of the images.
    text: L2-normalised embeddings of the texts.
    image_group: the group of each image. An image and a text belong together when their groups are equal.
    text_group: the group of each text.
    logit_scale: multiplier of the similarities.
    block: number of images that are compared with all texts at once.

  Returns:
    The means over the images, nothing where no image has a negative:
      effective_negatives: the exponential of the entropy of the weights that an image's negatives have among
        themselves: all of them where every one is pushed equally, 1 where a single one is.
      weight_of_hardest: the share of these weights that the most similar hundredth of the negatives has, at least one.
      weight_of_positive: one minus the probability of the texts that belong to the image, which is the weight of the
        pull and of all pushes together. Only images with such a text count; without any it is absent.
    And the weights by similarity, from the lowest to the highest that occurs, of the images that have both a text and a
    negative; None where there are none.

  Wang and Liu, "Understanding the Behaviour of Contrastive Loss" (arXiv 2012.09740), section 3.

  Examples:
    >>> both, group = np.eye(3, dtype=np.float32), np.arange(3)
    >>> means, profile = softmax_gradient(both, both, group, group, logit_scale=1.0)
    >>> {name: round(value, 3) for name, value in means.items()}
    {'effective_negatives': 2.0, 'weight_of_hardest': 0.5, 'weight_of_positive': 0.424}
    >>> profile.similarities[[0, -1]].round(2).tolist(), profile.push[[0, -1]].tolist(), profile.pull[[0, -1]].tolist()
    ([0.01, 0.99], [1.0, 0.0], [0.0, 1.0])
  """
  found: dict[str, list[float]] = {"effective_negatives": [], "weight_of_hardest": [], "weight_of_positive": []}
  sums = np.zeros((3, _INTERVALS))
  image, text = (np.asarray(side, np.float64) for side in (image, text))
  image_group, text_group = np.asarray(image_group), np.asarray(text_group)
  for start in range(0, len(image), block):
    rows = slice(start, start + block)
    similarities, together = image[rows] @ text.T, image_group[rows, None] == text_group
    for row, own in zip(logit_scale * similarities, together, strict=True):
      for name, value in _of_image(row, own).items():
        found[name].append(value)
    counts = together.any(axis=1) & ~together.all(axis=1)
    if counts.any():
      sums += _by_similarity(similarities[counts], together[counts], logit_scale)
  return {name: float(np.mean(values)) for name, values in found.items() if values}, _profile(*sums)


def _of_image(logits: Float[np.ndarray, "texts"], own: Bool[np.ndarray, "texts"]) -> dict[str, float]:
  """Computes the measures of one image, of which `own` are its texts; nothing without a negative."""
  negatives = np.sort(logits[~own])[::-1]
  if not len(negatives):
    return {}
  weights = np.exp(negatives - negatives[0])
  total = weights.sum()
  # The entropy of weights w / total is log(total) less their mean logarithm.
  entropy = math.log(total) - np.sum(weights * (negatives - negatives[0])) / total
  hardest = weights[: math.ceil(HARDEST * len(weights))].sum() / total
  found = {"effective_negatives": math.exp(entropy), "weight_of_hardest": hardest}
  if own.any():
    pull = np.logaddexp.reduce(logits[own]) - (math.log(total) + negatives[0])
    found["weight_of_positive"] = 1 / (1 + np.exp(np.clip(pull, -700, 700)))
  return found


def _by_similarity(
  similarities: Float[np.ndarray, "images texts"], together: Bool[np.ndarray, "images texts"], logit_scale: float
) -> Float[np.ndarray, "3 intervals"]:
  """Adds up the pushes, the pulls and the number of negatives in each interval of similarity."""
  place = np.clip(np.floor((similarities + 1) / WIDTH), 0, _INTERVALS - 1).astype(np.int64)
  weights = np.exp(logit_scale * (similarities - similarities.max(axis=1, keepdims=True)))
  own, other = (np.sum(weights, axis=1, where=which, keepdims=True) for which in (together, ~together))
  pushes = weights / (own + other)
  # What the pulls of an image add up to is what its pushes do: one less the probability of its texts.
  pulls = pushes * np.divide(other, own, where=own > 0, out=np.zeros_like(own))
  lines = (~together, pushes), (together, pulls), (~together, np.ones_like(weights))
  return np.stack([np.bincount(place[which], line[which], _INTERVALS) for which, line in lines])


def _profile(push, pull, negatives) -> GradientProfile | None:
  """Makes the profile of sums over all images."""
  if not negatives.any():
    return None
  occurring = np.flatnonzero(negatives + pull)
  shown = slice(occurring[0], occurring[-1] + 1)
  shares = (line[shown] / (line.sum() or 1.0) for line in (push, pull, negatives))
  return GradientProfile(((np.arange(_INTERVALS) + 0.5) * WIDTH - 1)[shown], *shares)
