"""The term in which patches of two views that show the same place of an image have the same features."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.batch import Batch
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.models.dual_encoder import DualEncoder
from contrastive_jax.models.layers import l2_normalize
from contrastive_jax.models.outputs import STRONG_IMAGE
from contrastive_jax.objectives import perceptron
from contrastive_jax.objectives.term import Arrays, LocalTerm, Sizes, count_of_pairs, sum_of_pairs

_VIEWS = 2
# Added to the variance of a token's hidden features.
_EPSILON = 1e-6

Features = Float[Array, "images views patches dim"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixPro(LocalTerm):
  """Minus four times the mean cosine of patches that lie on the same place of an image, in two strong views of it.

  On one side are the features of the image tower, smoothed over all patches of the view that resemble each other; on
  the other those that the moving average of the tower makes of the other view, as constants. A perceptron and the
  layer that is applied before the smoothing are no part of the model. An image whose two views have no place in common
  counts as 0. `data.strong_augment` says how much the views are changed.

  Attributes:
    hidden: size of the perceptron's hidden layer; None is four times that of the embeddings. The authors use 4,096
      with 256 features.
    threshold: the largest distance of two patches on the same place, in diagonals of the larger one.
    sharpness: power of the cosines by which patches are smoothed.

  Xie et al., "Propagate Yourself" (arXiv 2011.10043), equations 2 to 4, with the mean over images. The features of each
  patch are standardised in place of a batch norm over all patches.
  """

  hidden: int | None = within(COUNT, None)
  threshold: float = within(POSITIVE, 0.7)
  sharpness: float = within(POSITIVE, 2.0)

  leaves_out: ClassVar[bool] = True
  reads_squares: ClassVar[bool] = True

  @property
  def uses_average(self) -> bool:
    return True

  @property
  def strong_images(self) -> int:
    return _VIEWS

  def params(self, sizes: Sizes) -> Arrays:
    dim = sizes.embed_dim
    width = dim if sizes.model is None else sizes.model.image.transformer.width
    return {
      "projector": perceptron.variables((width, self.hidden or 4 * dim, dim), normed=True),
      "propagation": perceptron.variables((dim, dim), number=1),
    }

  def total(self, model, outputs, batch, params, average):
    slow, slow_params = average
    targets = slow.image_views(batch.image, batch.strong.patches[:, :_VIEWS], batch.pairs).states
    targets = lax.stop_gradient(l2_normalize(_projected(_patches(slow, targets, batch), slow_params["projector"])))
    features = _projected(_patches(model, outputs[STRONG_IMAGE].states, batch), params["projector"])
    predicted = _propagated(features, perceptron.gathered(params["propagation"]), self.sharpness)
    alike = same_place(batch, model.config.image.patch_size, self.threshold)

    def mean_cosine(one: int, other: int, alike: Bool[Array, "images one other"]) -> Float[Array, "images"]:
      cosines = _product("ipd,iqd->ipq", predicted[:, one], targets[:, other])
      return jnp.sum(jnp.where(alike, cosines, 0), axis=(1, 2)) / (jnp.sum(alike, axis=(1, 2)) + 1e-6)

    losses = -2 * (mean_cosine(0, 1, alike) + mean_cosine(1, 0, alike.swapaxes(1, 2)))
    return sum_of_pairs(losses, batch)

  def count(self, batch):
    return count_of_pairs(batch)


def same_place(batch: Batch, patch_size: int, threshold: float) -> Bool[Array, "images first second"]:
  """Says which patches of the first strong view of an image lie on the place of which patches of the second.

  Args:
    batch: the images, with strong views of them.
    patch_size: side of a patch in pixels.
    threshold: the largest distance of their middles, in diagonals of the larger of the two.
  """
  places = jnp.asarray(batch.strong.places[:, :_VIEWS], jnp.float32)
  # Pixels are counted from the middle of the first one.
  middles = jnp.asarray(batch.image.coords)[:, None, :, :0:-1] * patch_size + (patch_size - 1) / 2
  places_of_patches = (
    _product("ivab,ivpb->ivpa", places[..., :2], middles.repeat(_VIEWS, axis=1)) + places[..., None, :, 2]
  )
  diagonals = patch_size * jnp.sqrt(jnp.sum(jnp.square(places[..., :2]), axis=(2, 3)))
  apart = places_of_patches[:, 0, :, None] - places_of_patches[:, 1, None]
  return jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1)) < threshold * jnp.max(diagonals, axis=1)[:, None, None]


def _patches(model: DualEncoder, states: Float[Array, "rows length width"], batch: Batch) -> Features:
  """Returns the states of the patches of the two views, without the class token."""
  states = states[:, int(model.config.image.class_token) :].astype(jnp.float32)
  return states.reshape(batch.pairs, -1, *states.shape[1:])[:, :_VIEWS]


def _projected(states: Features, params: Arrays) -> Features:
  return perceptron.apply(perceptron.gathered(params), states, _standardized)


def _standardized(features: jax.Array) -> jax.Array:
  centred = features - jnp.mean(features, axis=-1, keepdims=True)
  return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + _EPSILON)


def _propagated(features: Features, layer: Arrays, sharpness: float) -> Features:
  """Returns the features of each patch, summed over the patches of its view by their likeness, and normalised."""
  values, normalised = l2_normalize(perceptron.apply(layer, features)), l2_normalize(features)
  cosines = _product("ivpd,ivqd->ivpq", normalised, normalised)
  # Where a cosine is not positive its power has no gradient, whatever the power.
  likeness = jnp.where(cosines > 0, jnp.where(cosines > 0, cosines, 1) ** sharpness, 0)
  return l2_normalize(_product("ivpq,ivqd->ivpd", likeness, values))


def _product(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.einsum(subscripts, one, other, precision=lax.Precision.HIGHEST)
