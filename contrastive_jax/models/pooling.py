"""From token states to one vector an image or caption, with sums in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.models.attention import MASKED
from contrastive_jax.models.layers import Linear, Mlp, Norm, ParameterMaker, kernel_init, xavier_uniform
from contrastive_jax.models.presets import TransformerConfig


def select(states: Float[Array, "rows length width"], index: Int[Array, "rows"]) -> Float[Array, "rows width"]:
  """One token of each row."""
  return jnp.take_along_axis(states, index[:, None, None], axis=1)[:, 0]


def last_true(mask: Bool[Array, "rows length"]) -> Int[Array, "rows"]:
  """Position of the last True of each row; 0 where there is none."""
  return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)


class Owners:
  """Which pair each token of packed rows belongs to, for sums and softmaxes over the tokens of each pair.

  Args:
    segments: `[rows, length]`, 0 is padding.
    slots: `[pairs, 2]`, the (row, segment) of each pair.
  """

  def __init__(self, segments: Any, slots: Any):
    rows, length = segments.shape
    self.pairs = slots.shape[0]
    # A row holds at most `length` segments. Tokens without an owner go to one more, imaginary pair.
    owner = jnp.full((rows, length + 1), self.pairs, jnp.int32)
    owner = owner.at[slots[:, 0], slots[:, 1]].set(jnp.arange(self.pairs, dtype=jnp.int32))
    owner = owner.at[:, 0].set(self.pairs)
    self.owner = jnp.take_along_axis(owner, segments.astype(jnp.int32), axis=1).reshape(-1)

  def sum(self, values: Float[Array, "rows length *features"]) -> Float[Array, "pairs *features"]:
    """Sum over the tokens of each pair."""
    flat = values.reshape(-1, *values.shape[2:])
    return jax.ops.segment_sum(flat, self.owner, self.pairs + 1)[:-1]

  def softmax(self, logits: Float[Array, "rows length heads"]) -> Float[Array, "rows length heads"]:
    """Softmax over the tokens of each pair."""
    flat = logits.reshape(-1, logits.shape[-1])
    highest = jax.ops.segment_max(jax.lax.stop_gradient(flat), self.owner, self.pairs + 1)
    unnormalised = jnp.exp(flat - highest[self.owner])
    total = jax.ops.segment_sum(unnormalised, self.owner, self.pairs + 1)
    return (unnormalised / total[self.owner]).reshape(logits.shape)


def mean(
  states: Float[Array, "rows length width"], mask: Bool[Array, "rows length"] | None, owners: Owners | None = None
) -> Float[Array, "pairs width"]:
  """Mean over the tokens of each row, over those that `mask` marks, or over those of each packed pair."""
  states = states.astype(jnp.float32)
  if owners is not None:
    ones = jnp.ones((*states.shape[:2], 1), jnp.float32)
    return owners.sum(states) / jnp.maximum(owners.sum(ones), 1)
  if mask is None:
    return jnp.mean(states, axis=1)
  weights = mask.astype(jnp.float32)[..., None]
  return jnp.sum(states * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


class AttentionPool(nnx.Module):
  """Multi-head attention with one learned query, then an MLP with a residual (MAP, arXiv 2106.04560, as in SigLIP)."""

  def __init__(self, config: TransformerConfig, *, dtype: str, make: ParameterMaker):
    width = config.width
    self.config = config
    self.probe = make((width,), xavier_uniform(1, width), (None,))
    init = kernel_init(config, width, width, role="attention")
    self.q = Linear(width, width, init=init, axes=("embed", "heads"), dtype=dtype, make=make)
    # Columns are ordered (head, key | value, feature), see `attention.fuse_heads`.
    self.kv = Linear(width, 2 * width, init=init, axes=("embed", "heads"), dtype=dtype, make=make)
    self.out = Linear(width, width, init=init, axes=("heads", "embed"), dtype=dtype, make=make)
    self.norm = Norm(width, kind=config.norm, eps=config.norm_eps, make=make)
    self.mlp = Mlp(config, dtype=dtype, make=make)

  def __call__(
    self,
    states: Float[Array, "rows length width"],
    *,
    mask: Bool[Array, "rows length"] | None = None,
    owners: Owners | None = None,
  ) -> Float[Array, "pairs width"]:
    """Pools each row, the tokens of it that `mask` marks, or the tokens of each packed pair."""
    rows, length, _ = states.shape
    heads, head_dim = self.config.heads, self.config.head_dim
    query = self.q(self.probe[...]).reshape(heads, head_dim)
    kv = self.kv(states).reshape(rows, length, heads, 2, head_dim)
    keys, values = kv[..., 0, :], kv[..., 1, :].astype(jnp.float32)
    logits = jnp.einsum("rlhd,hd->rlh", keys, query * head_dim**-0.5, preferred_element_type=jnp.float32)
    if owners is not None:
      pooled = owners.sum(owners.softmax(logits)[..., None] * values)
    else:
      if mask is not None:
        logits = jnp.where(mask[..., None], logits, MASKED)
      pooled = jnp.einsum("rlh,rlhd->rhd", jax.nn.softmax(logits, axis=1), values)
    x = self.out(pooled.reshape(pooled.shape[0], -1))
    return x + self.mlp(self.norm(x))
