"""The term in which the image tower tells by how much images were rotated."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt8

from contrastive_jax.batch import Batch, ImageBatch
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import perceptron
from contrastive_jax.objectives.term import Arrays, LocalTerm, Sizes
from contrastive_jax.parallel.mesh import BATCH_AXES

TURNS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation(LocalTerm):
  """The mean cross-entropy of which quarter turn an image has made, of four, told from the image tower's own features.

  Each image that takes part is shown in all four directions, to this term alone: captions name directions, and no
  caption meets a turned image. The perceptron that tells them has two hidden layers and is no part of the model.

  Attributes:
    every: one of so many consecutive pairs takes part; the image tower runs `4 / every` times more. It must divide the
      pairs that a device has in a micro-batch, so that the choice does not depend on the devices.
    hidden: sizes of the two hidden layers.

  The rotations of ScatSimCLR (arXiv 2108.13939), whose weight is 0.3, without the dropout of its perceptron; after
  Gidaris et al., "Unsupervised representation learning by predicting image rotations" (arXiv 1803.07728).
  """

  every: int = within(COUNT, 4)
  hidden: tuple[int, int] = within(COUNT, (512, 128))

  leaves_out: ClassVar[bool] = True
  reads_squares: ClassVar[bool] = True

  def unlearned(self, pairs: int) -> float:
    return math.log(TURNS)

  def params(self, sizes: Sizes) -> Arrays:
    width = sizes.embed_dim if sizes.model is None else sizes.model.image.transformer.width
    return perceptron.variables((width, *self.hidden, TURNS))

  def total(self, model, outputs, batch, params):
    patches, coords = (self._chosen(leaf) for leaf in (batch.image.patches, batch.image.coords))
    count = len(patches)
    found = model.image_views(ImageBatch(patches, coords), turned(patches, model.config.image.patch_size), count)
    features = found.pooled.reshape(count, TURNS, -1).astype(jnp.float32)
    logits = perceptron.apply(perceptron.gathered(params), features)
    losses = -jnp.diagonal(jax.nn.log_softmax(logits), axis1=1, axis2=2)
    if batch.present is not None:
      losses = jnp.where(self._chosen(batch.present)[:, None], losses, 0)
    return jnp.sum(losses) / TURNS

  def count(self, batch: Batch):
    if batch.present is None:
      return jnp.float32(batch.pairs // self.every)
    return jnp.sum(self._chosen(batch.present).astype(jnp.float32))

  def _chosen(self, leaf: Shaped[Array, "pairs ..."] | Any) -> Shaped[Array, "chosen ..."] | Any:
    """Returns the part of an array that belongs to the pairs that take part."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if len(leaf) // shards % self.every:
      raise UserError(
        f"loss_options.rotation.every={self.every} does not divide the {len(leaf) // shards} pairs of a device in a"
        " micro-batch: choose a divisor of them"
      )
    return leaf.reshape(-1, self.every, *leaf.shape[1:])[:, 0]


def turned(patches: UInt8[Array, "images length patch_dim"] | Any, patch_size: int) -> UInt8[Array, "images 4 _ _"]:
  """Returns square images as they are, and after one, two and three quarter turns to the left, as patches again.

  Args:
    patches: the patches of each image, row by row.
    patch_size: side of a patch in pixels.
  """
  images, length, patch_dim = patches.shape
  side, pixels = math.isqrt(length), patch_size
  whole = patches.reshape(images, side, side, pixels, pixels, patch_dim // pixels**2)
  whole = whole.transpose(0, 1, 3, 2, 4, 5).reshape(images, side * pixels, side * pixels, -1)
  every = jnp.stack([jnp.rot90(whole, turns, axes=(1, 2)) for turns in range(TURNS)], axis=1)
  every = every.reshape(images, TURNS, side, pixels, side, pixels, -1).transpose(0, 1, 2, 4, 3, 5, 6)
  return every.reshape(images, TURNS, length, patch_dim)
