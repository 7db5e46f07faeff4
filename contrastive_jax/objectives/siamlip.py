"""The term in which a small network predicts the text embedding of an image, and the image embedding of a text."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives import mlp
from contrastive_jax.objectives.term import Arrays, LocalTerm, Sizes
from contrastive_jax.parallel.placement import gathered


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

  def params(self, sizes: Sizes) -> Arrays:
    dim = sizes.embed_dim
    hidden = self.hidden or max(dim // 4, 1)
    return {tower: mlp.variables(dim, hidden, dim, number) for number, tower in enumerate(("image", "text"))}

  def total(self, model, outputs, batch, params):
    image, text = outputs["image"].embedding, outputs["text"].embedding
    return (_distance(params["image"], image, text) + _distance(params["text"], text, image)) / 2

  def count(self, batch):
    return jnp.float32(batch.pairs)


def _distance(params: Arrays, embedding: jax.Array, target: jax.Array) -> jax.Array:
  """Sums `2 - 2 cos` of what is predicted from an embedding and the target."""
  target = lax.stop_gradient(target)
  whole = {**params, "into": gathered(params["into"], mlp.INTO), "out": gathered(params["out"], mlp.OUT)}
  predicted = mlp.apply(whole, embedding)
  # A prediction of zero has no direction: its cosine is 0, with a gradient that is finite.
  square = jnp.sum(jnp.square(predicted), axis=1)
  length = jnp.sqrt(jnp.where(square > 0, square, 1))
  return jnp.sum(2 - 2 * jnp.sum(predicted * target, axis=1) / length)
