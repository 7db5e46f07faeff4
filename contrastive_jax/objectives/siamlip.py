"""The term in which a small network predicts the text embedding of an image, and the image embedding of a text."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives import perceptron
from contrastive_jax.objectives.term import Arrays, LocalTerm, Sizes, count_of_pairs, sum_of_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siamlip(LocalTerm):
  """The mean of `2 - 2 cos(predicted, target)` over both directions, in which no gradient reaches the target.

  The predictors are a layer, a rectifier and a layer for each tower. They are only needed to train and are no part of
  the model. Without a term that separates, targets and predictions may still collapse into a point.

  Attributes:
    hidden: size of the predictors' hidden layer; None is a quarter of the embeddings' size.

  SiamLIP of "Improved baselines for vision-language pre-training" (arXiv 2305.08675), after SimSiam (arXiv 2011.10566);
  the batch norm of its predictor is left out, which would make a pair depend on the others.
  """

  hidden: int | None = within(COUNT, None)

  leaves_out: ClassVar[bool] = True

  def params(self, sizes: Sizes) -> Arrays:
    dim = sizes.embed_dim
    widths = dim, self.hidden or max(dim // 4, 1), dim
    return {tower: perceptron.variables(widths, number=number) for number, tower in enumerate(("image", "text"))}

  def total(self, model, outputs, batch, params):
    image, text = outputs["image"].embedding, outputs["text"].embedding
    distances = _distances(params["image"], image, text) + _distances(params["text"], text, image)
    return sum_of_pairs(distances / 2, batch)

  def count(self, batch):
    return count_of_pairs(batch)


def _distances(params: Arrays, embedding: jax.Array, target: jax.Array) -> jax.Array:
  """Computes `2 - 2 cos` of what is predicted from each embedding and its target."""
  target = lax.stop_gradient(target)
  predicted = perceptron.apply(perceptron.gathered(params), embedding)
  # A prediction of zero has no direction: its cosine is 0, with a gradient that is finite.
  square = jnp.sum(jnp.square(predicted), axis=1)
  length = jnp.sqrt(jnp.where(square > 0, square, 1))
  return 2 - 2 * jnp.sum(predicted * target, axis=1) / length
