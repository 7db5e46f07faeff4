"""The image tower: patches of any number of images a row into one vector an image."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import pooling
from contrastive_jax.models.attention import segment_mask
from contrastive_jax.models.layers import Linear, Norm, ParameterMaker, make_projection, normal
from contrastive_jax.models.positions import resampled, rope_angles, sincos_2d
from contrastive_jax.models.presets import VisionConfig
from contrastive_jax.models.transformer import Transformer


class VisionTower(nnx.Module):
  """A vision transformer over patches with coordinates."""

  def __init__(self, config: VisionConfig, embed_dim: int, *, dtype: str, make: ParameterMaker):
    transformer = config.transformer
    width = transformer.width
    self.config = config
    self.dtype = dtype
    self.patch_embedding = Linear(
      config.patch_dim,
      width,
      init=normal(config.patch_dim**-0.5),
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
    self.pre_norm = self._norm(make) if config.pre_norm else None
    self.transformer = Transformer(transformer, dtype=dtype, make=make)
    self.post_norm = self._norm(make) if config.post_norm else None
    self.pool = pooling.AttentionPool(transformer, dtype=dtype, make=make) if config.pool == "map" else None
    self.projection = make_projection(config, embed_dim, dtype=dtype, make=make)

  def _norm(self, make: ParameterMaker) -> Norm:
    transformer = self.config.transformer
    return Norm(transformer.width, kind=transformer.norm, eps=transformer.norm_eps, make=make)

  def __call__(self, image: ImageBatch, *, keys: Key[Array, "rows"] | None = None) -> Float[Array, "pairs dim"]:
    """Embeds the images, not normalised.

    Args:
      image: patches; packed when it has segments and slots, else a row is an image.
      keys: of dropout and drop path, one a row; None is deterministic.

    Raises:
      UserError: if packed rows meet a class token, of which there is one a row.
    """
    packed = image.segments is not None
    if packed and self.config.class_token:
      raise UserError("vision.class_token=True has no place in packed rows: use vision.pool='map' or 'mean' without it")
    states = self.states(image, keys=keys)
    if self.config.pool == "cls":
      states = states[:, :1]
    if self.post_norm is not None:
      states = self.post_norm(states)
    if self.config.pool == "cls":
      pooled = states[:, 0]
    else:
      owners = pooling.Owners(image.segments, image.slots) if packed else None
      if self.pool is not None:
        pooled = self.pool(states, owners=owners)
      else:
        patches = states[:, 1:] if self.config.class_token else states
        pooled = pooling.mean(patches, None, owners)
    return pooled if self.projection is None else self.projection(pooled)

  def states(self, image: ImageBatch, *, keys: Key[Array, "rows"] | None = None) -> Float[Array, "rows length width"]:
    """Token states after the last block, before the last norm; the class token comes first."""
    config = self.config
    x = self.patch_embedding(self._pixels(image.patches))
    x = x + self._positions(image).astype(x.dtype)
    if self.class_token is not None:
      first = self.class_token[...]
      if self.position is not None:
        first = first + self.position[0]
      first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
      x = jnp.concatenate([first, x], axis=1)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    angles = None
    if config.transformer.rope:
      angles = rope_angles(image.coords, config.transformer.head_dim)
      if self.class_token is not None:
        angles = jnp.pad(angles, ((0, 0), (1, 0), (0, 0)))  # The class token does not rotate.
    mask = None if image.segments is None else segment_mask(image.segments)
    return self.transformer(x, mask=mask, angles=angles, keys=keys)

  def _pixels(self, patches) -> Float[Array, "rows length patch_dim"]:
    if patches.shape[-1] != self.config.patch_dim:
      raise UserError(
        f"patches of {patches.shape[-1]} bytes do not fit vision.patch_size={self.config.patch_size} and"
        f" vision.channels={self.config.channels}, which need {self.config.patch_dim}"
      )
    repeats = self.config.patch_size**2
    mean = 255 * jnp.tile(jnp.array(self.config.mean, jnp.float32), repeats)
    std = 255 * jnp.tile(jnp.array(self.config.std, jnp.float32), repeats)
    return ((patches.astype(jnp.float32) - mean) / std).astype(self.dtype)

  def _positions(self, image: ImageBatch) -> Float[Array, "#rows length width"] | Float[Array, ""]:
    if self.config.position == "none":
      return jnp.float32(0)
    if self.config.position == "sincos2d":
      return sincos_2d(image.coords, self.config.transformer.width)
    table = self.position[self.config.class_token :]
    # At the resolution of the table the patches come in its order.
    if image.segments is None and image.patches.shape[1] == table.shape[0]:
      return table[None]
    return resampled(table, image.coords, image.segments)
