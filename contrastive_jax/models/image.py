"""The image tower: embeds rows of patches, of one or several images or clips, as one vector each."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import pooling
from contrastive_jax.models.config import ImageConfig
from contrastive_jax.models.layers import (
  Linear,
  ParameterMaker,
  l2_normalize,
  linear,
  make_norm,
  make_projection,
  normal,
)
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.models.positions import read, resampled, rope_angles, sincos_2d
from contrastive_jax.models.transformer import Transformer


class ImageTower(nnx.Module):
  """A vision transformer over patches with coordinates."""

  def __init__(self, config: ImageConfig, embed_dim: int, *, dtype: str, make: ParameterMaker):
    transformer = config.transformer
    width = transformer.width
    self.config = config
    self.dtype = dtype
    self.patch_embedding = Linear(
      config.tubelet * config.patch_dim,
      width,
      # An image repeats its one frame, so that its kernel is the sum over the frames.
      init=normal((config.tubelet * config.patch_dim) ** -0.5),
      axes=(None, "embed"),
      use_bias=config.patch_bias,
      dtype=dtype,
      make=make,
    )
    self.class_token = make((width,), normal(width**-0.5), (None,)) if config.class_token else None
    # With a class token its position comes first, as in CLIP.
    shape = (config.grid**2 + config.class_token, width)
    learned = config.position == "learned"
    self.position = make(shape, normal(width**-0.5), (None, "embed")) if learned else None
    timed = config.time_position == "learned"
    self.time_position = make((config.max_time, width), normal(width**-0.5), (None, "embed")) if timed else None
    self.pre_norm = make_norm(transformer, make=make) if config.pre_norm else None
    self.transformer = Transformer(transformer, dtype=dtype, make=make)
    self.post_norm = make_norm(transformer, make=make) if config.post_norm else None
    self.pool = pooling.AttentionPool(transformer, dtype=dtype, make=make) if config.pool == "map" else None
    self.projection = make_projection(config, embed_dim, dtype=dtype, make=make)

  @jax.named_scope("image")
  def __call__(self, image: ImageBatch, *, keys: Key[Array, "rows"] | None = None) -> TowerOutputs:
    """Embeds images.

    Args:
      image: the patches. Rows are packed when it has `locations`; else a row is one image or clip, with padding
        at its end where there are segment ids.
      keys: the random key of each row, for dropout and drop path; None is deterministic.

    Raises:
      UserError: if packed rows meet a class token, of which there is one a row.
    """
    packed = image.locations is not None
    if packed and self.config.class_token:
      raise UserError(
        "model.image.class_token=True has no place in packed rows: use model.image.pool='map' or 'mean' without it"
      )
    states = self._states(image, keys)
    finished = states if self.post_norm is None else self.post_norm(states)
    pooled = self._pooled(states, finished, image)
    embedding = l2_normalize(pooled if self.projection is None else self.projection(pooled))
    return TowerOutputs(embedding, pooled, finished)

  def _pooled(
    self, states: Float[Array, "rows length width"], finished: Float[Array, "rows length width"], image: ImageBatch
  ) -> Float[Array, "pairs width"]:
    if self.config.pool == "cls":
      # The norm treats tokens one by one: only the class token needs it.
      return (states[:, :1] if self.post_norm is None else self.post_norm(states[:, :1]))[:, 0]
    states = finished
    tokens = pooling.Tokens.of(image.segment_ids, image.locations)
    if self.config.class_token:
      # The class token takes part in attention pooling, as any token, and not in the mean of the patches.
      states, tokens = (states, tokens.with_first()) if self.pool is not None else (states[:, 1:], tokens)
    return tokens.mean(states) if self.pool is None else self.pool(states, tokens)

  def _states(self, image: ImageBatch, keys: Key[Array, "rows"] | None) -> Float[Array, "rows length width"]:
    """Returns the token states after the last block and before the last norm; the class token comes first."""
    config = self.config
    x = self._embedded(image.patches)
    x = x + self._positions(image).astype(x.dtype)
    if self.time_position is not None:
      x = x + read(self.time_position[...], image.coords[..., 0]).astype(x.dtype)
    if self.class_token is not None:
      first = self.class_token[...]
      if self.position is not None:
        first = first + self.position[0]
      first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
      x = jnp.concatenate([first, x], axis=1)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    angles, segment_ids = None, image.segment_ids
    if config.transformer.rope:
      angles = rope_angles(image.coords, config.transformer.head_dim, config.transformer.rope)
    if self.class_token is not None:
      if angles is not None:
        angles = jnp.pad(angles, ((0, 0), (1, 0), (0, 0)))  # The class token does not rotate.
      if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=1)
    return self.transformer(x, segment_ids=segment_ids, angles=angles, keys=keys)

  def _embedded(self, patches) -> Float[Array, "rows length width"]:
    """Embeds patches without their positions; their size tells whether they are of images or of clips."""
    config, frames = self.config, patches.shape[-1] // self.config.patch_dim
    if patches.shape[-1] != frames * config.patch_dim or frames not in (1, config.tubelet):
      raise UserError(
        f"patches of {patches.shape[-1]} bytes do not fit model.image.patch_size={config.patch_size},"
        f" model.image.channels={config.channels} and model.image.tubelet={config.tubelet}, which"
        f" need {config.patch_dim} for an image and {config.tubelet * config.patch_dim} for a clip"
      )
    pixels = self._pixels(patches, frames)
    if frames == config.tubelet:
      return self.patch_embedding(pixels)
    # An image is a clip of equal frames: the kernel is summed over them instead of the image repeated.
    embedding = self.patch_embedding
    kernel = jnp.sum(embedding.kernel[...].reshape(config.tubelet, config.patch_dim, -1), axis=0)
    bias = None if embedding.bias is None else embedding.bias[...]
    return linear(pixels, kernel, bias, embedding.axes, embedding.dtype)

  def _pixels(self, patches, frames: int) -> Float[Array, "rows length patch_dim"]:
    repeats = frames * self.config.patch_size**2
    mean = 255 * jnp.tile(jnp.array(self.config.mean, jnp.float32), repeats)
    std = 255 * jnp.tile(jnp.array(self.config.std, jnp.float32), repeats)
    return ((patches.astype(jnp.float32) - mean) / std).astype(self.dtype)

  def _positions(self, image: ImageBatch) -> Float[Array, "#rows length width"] | Float[Array, ""]:
    if self.config.position == "none":
      return jnp.float32(0)
    if self.config.position == "sincos2d":
      return sincos_2d(image.coords, self.config.transformer.width)
    table = self.position[self.config.class_token :]
    # At the resolution of the table the patches of an image come in its order, where none is missing.
    whole = image.patches.shape[-1] == self.config.patch_dim and image.grids is None
    if whole and image.segment_ids is None and image.patches.shape[1] == table.shape[0]:
      return table[None]
    return resampled(table, image.coords, image.segment_ids, image.grids)
