"""The transformer of both towers: blocks with stacked parameters, run by one loop over depth."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from contrastive_jax.models.attention import SelfAttention
from contrastive_jax.models.config import TransformerConfig
from contrastive_jax.models.layers import LayerScale, Mlp, ParameterMaker, drop_path, dropout, fold_in, make_norm
from contrastive_jax.parallel.placement import split_by_rows


def _policy(remat: str) -> Callable[..., bool]:
  """Returns what is kept for the backward pass, as `TransformerConfig.remat` names it."""
  if remat == "full":
    return jax.checkpoint_policies.nothing_saveable
  if remat == "dots":
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint_policies.save_only_these_names(*remat.split("+"))


class Block(nnx.Module):
  """Attention and MLP, each added to the residual stream."""

  def __init__(self, config: TransformerConfig, *, dtype: str, make: ParameterMaker):
    norm = functools.partial(make_norm, config, make=make)
    self.config = config
    self.norm1, self.norm2 = norm(), norm()
    self.attention = SelfAttention(config, dtype=dtype, make=make)
    self.attention_norm = norm() if config.attention_norm else None
    self.mlp = Mlp(config, dtype=dtype, make=make)
    scaled, value = config.layer_scale is not None, config.layer_scale
    self.scale1 = LayerScale(config.width, value, make=make) if scaled else None
    self.scale2 = LayerScale(config.width, value, make=make) if scaled else None

  def __call__(
    self,
    x: Float[Array, "rows length width"],
    *,
    mask: Bool[Array, "rows #length length"] | None = None,
    segment_ids: Int[Array, "rows length"] | None = None,
    angles: Float[Array, "rows length half_head_dim"] | None = None,
    keys: Key[Array, "rows"] | None = None,
    drop_rate: Float[Array, ""] | None = None,
  ) -> Float[Array, "rows length width"]:
    """Runs the block on tokens, with the arguments of `Transformer` and the drop path rate of this block."""
    first, second = (None, None) if keys is None else (fold_in(keys, 0), fold_in(keys, 1))
    before = self.config.norm_position == "pre"
    attended = self.attention(self.norm1(x) if before else x, mask=mask, segment_ids=segment_ids, angles=angles)
    if self.attention_norm is not None:
      attended = self.attention_norm(attended)
    x = x + self._branch(attended, self.scale1, first, drop_rate)
    x = checkpoint_name(x if before else self.norm1(x), "stream")
    x = x + self._branch(self.mlp(self.norm2(x) if before else x), self.scale2, second, drop_rate)
    return x if before else self.norm2(x)

  def _branch(self, x, scale, keys, drop_rate):
    if scale is not None:
      x = scale(x)
    if keys is None:
      return x
    if self.config.dropout:
      x = dropout(x, self.config.dropout, fold_in(keys, 0))
    return drop_path(x, drop_rate, fold_in(keys, 1)) if self.config.drop_path else x


class Transformer(nnx.Module):
  """`depth` blocks whose parameters are stacked along a leading axis."""

  def __init__(self, config: TransformerConfig, *, dtype: str, make: ParameterMaker):
    self.config = config
    stacked = dataclasses.replace(make, depth=config.depth)
    self.blocks = Block(config, dtype=dtype, make=stacked)

  def __call__(
    self,
    x: Float[Array, "rows length width"],
    *,
    mask: Bool[Array, "rows #length length"] | None = None,
    segment_ids: Int[Array | np.ndarray, "rows length"] | None = None,
    angles: Float[Array, "rows length half_head_dim"] | None = None,
    keys: Key[Array, "rows"] | None = None,
    first: int = 0,
    last: int | None = None,
  ) -> Float[Array, "rows length width"]:
    """Runs the blocks.

    Args:
      x: the tokens, in the compute dtype.
      mask: True where the query (second axis) sees the key (third axis); None lets all see all.
      segment_ids: the segment of each token, which sees those of its own segment; 0 is padding, which sees padding.
      angles: the rotary angles of each token, as `positions.rope_angles` makes them.
      keys: the random key of each row, for dropout and drop path, so that what a row draws does not depend on the batch
        around it. None is deterministic.
      first: number of blocks at the beginning that are left out, for tokens that have gone through them.
      last: number of the block after which it stops; None runs all that follow.
    """
    config = self.config
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    graphdef, stacked = nnx.split(self.blocks)
    random = keys is not None and (config.dropout > 0 or config.drop_path > 0)

    def body(x, layer):
      x = split_by_rows(x)
      params, index, rate = layer
      layer_keys = fold_in(keys, index) if random else None
      block = nnx.merge(graphdef, params)
      return block(x, mask=mask, segment_ids=segment_ids, angles=angles, keys=layer_keys, drop_rate=rate), None

    count = len(range(config.depth)[first:last])
    looped = config.unroll < count
    if config.remat != "none":
      # Inside a loop nothing can be merged with the forward pass, so the costly barriers against it are not needed.
      body = jax.checkpoint(body, policy=_policy(config.remat), prevent_cse=not looped)
    rates = jnp.linspace(0.0, config.drop_path, config.depth, dtype=jnp.float32)
    layers = (nnx.to_pure_dict(stacked), jnp.arange(config.depth), rates)
    if count < config.depth:
      layers = jax.tree.map(lambda leaf: leaf[first:last], layers)
    if looped:
      return split_by_rows(jax.lax.scan(body, x, layers, unroll=config.unroll)[0])
    leaves, structure = jax.tree.flatten(layers)
    for layer in zip(*map(jnp.unstack, leaves), strict=True):
      x, _ = body(x, jax.tree.unflatten(structure, layer))
    return split_by_rows(x)
