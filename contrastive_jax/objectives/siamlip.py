"""The term in which a small network predicts the text embedding of an image, and the image embedding of a text."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives.term import Arrays, LocalTerm, Sizes, Variable, count_of_pairs, sum_of_pairs
from contrastive_jax.parallel.placement import gathered

# FSDP splits what is multiplied by the embedding's features.
_INTO, _OUT = ("embed", None), (None, "embed")


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
    hidden = self.hidden or max(dim // 4, 1)

    def zeros(length: int, axis: str | None) -> Variable:
      return Variable((length,), (axis,), lambda _, shape: jnp.zeros(shape))

    return {
      tower: {
        "into": Variable((dim, hidden), _INTO, _normal(number, 0)),
        "into_bias": zeros(hidden, None),
        "out": Variable((hidden, dim), _OUT, _normal(number, 1)),
        "out_bias": zeros(dim, None),
      }
      for number, tower in enumerate(("image", "text"))
    }

  def total(self, model, outputs, batch, params):
    image, text = outputs["image"].embedding, outputs["text"].embedding
    distances = _distances(params["image"], image, text) + _distances(params["text"], text, image)
    return sum_of_pairs(distances / 2, batch)

  def count(self, batch):
    return count_of_pairs(batch)


def _distances(params: Arrays, embedding: jax.Array, target: jax.Array) -> jax.Array:
  """Computes `2 - 2 cos` of what is predicted from each embedding and its target."""
  target = lax.stop_gradient(target)
  hidden = jax.nn.relu(_product(embedding, gathered(params["into"], _INTO)) + params["into_bias"])
  predicted = _product(hidden, gathered(params["out"], _OUT)) + params["out_bias"]
  # A prediction of zero has no direction: its cosine is 0, with a gradient that is finite.
  square = jnp.sum(jnp.square(predicted), axis=1)
  length = jnp.sqrt(jnp.where(square > 0, square, 1))
  return 2 - 2 * jnp.sum(predicted * target, axis=1) / length


def _product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.matmul(rows, kernel, precision=lax.Precision.HIGHEST)


def _normal(tower: int, layer: int):
  """Returns the maker of a kernel; each is drawn from a key of its own."""

  def create(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, 2 * tower + layer), shape) / jnp.sqrt(shape[0])

  return create
