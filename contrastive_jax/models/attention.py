"""Self-attention: one fused kernel for queries, keys and values, and one function that attends."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from contrastive_jax.models.layers import Linear, Norm, ParameterMaker, kernel_init, linear
from contrastive_jax.models.positions import rotate
from contrastive_jax.models.presets import TransformerConfig

# Logit of what is not seen. Finite, so that a query without any visible key gives a mean and not a NaN.
MASKED = -1e30


def attend(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  mask: Bool[Array, "rows #length length"] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
  """Scaled dot-product attention, with the softmax in float32.

  Args:
    queries: of each token.
    keys: of each token.
    values: of each token.
    causal: a token sees itself and earlier ones.
    mask: True where the query (second axis) sees the key (third axis).
  """
  # Heads first, for both products and their gradients: on CPU twice as fast as leaving the order to einsum.
  queries, keys, values = (jnp.swapaxes(part, 1, 2) for part in (queries, keys, values))
  scale = queries.shape[-1] ** -0.5
  logits = jnp.einsum("rhqd,rhkd->rhqk", queries * scale, keys, preferred_element_type=jnp.float32)
  if causal:
    length = queries.shape[2]
    logits = jnp.where(jnp.tri(length, dtype=bool), logits, MASKED)
  if mask is not None:
    logits = jnp.where(mask[:, None], logits, MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
  return jnp.swapaxes(jnp.einsum("rhqk,rhkd->rhqd", weights, values), 1, 2)


def segment_mask(segments: Any) -> Bool[Array, "rows length length"]:
  """True between tokens of the same segment `[rows, length]`. Padding sees padding, which nothing reads."""
  return segments[:, :, None] == segments[:, None, :]


def fuse_heads(parts: list[Any], heads: int) -> Any:
  """Joins kernels or biases `[..., heads * head_dim]` of several projections, head by head.

  The columns are ordered (head, part, feature) so that splitting them over devices splits heads.
  """
  split = [part.reshape(*part.shape[:-1], heads, 1, -1) for part in parts]
  joined = jnp.concatenate(split, axis=-2)
  return joined.reshape(*parts[0].shape[:-1], -1)


def split_heads(fused: Any, heads: int, parts: int) -> list[Any]:
  """The inverse of `fuse_heads`."""
  split = fused.reshape(*fused.shape[:-1], heads, parts, -1)
  return [split[..., part, :].reshape(*fused.shape[:-1], -1) for part in range(parts)]


class SelfAttention(nnx.Module):
  """Multi-head self-attention. The fused kernel's columns are ordered (head, query | key | value, feature)."""

  def __init__(self, config: TransformerConfig, *, dtype: str, make: ParameterMaker):
    width = config.width
    self.config = config
    self.qkv = Linear(
      width,
      3 * width,
      init=kernel_init(config, width, width, role="attention"),
      axes=("embed", "heads"),
      use_bias=config.qkv_bias,
      dtype=dtype,
      make=make,
    )
    self.out = Linear(
      width,
      width,
      init=kernel_init(config, width, width, role="residual"),
      axes=("heads", "embed"),
      dtype=dtype,
      make=make,
    )
    features = {None: 0, "head": config.head_dim, "full": width}[config.qk_norm]
    self.q_norm = Norm(features, kind="rmsnorm", eps=config.norm_eps, make=make) if features else None
    self.k_norm = Norm(features, kind="rmsnorm", eps=config.norm_eps, make=make) if features else None

  def __call__(
    self,
    x: Float[Array, "rows length width"],
    *,
    mask: Bool[Array, "rows #length length"] | None = None,
    angles: Float[Array, "rows length half_head_dim"] | None = None,
  ) -> Float[Array, "rows length width"]:
    """See `attend` for `mask` and `positions.rope_angles` for `angles`."""
    rows, length, width = x.shape
    # Three products: a TPU pays more for cutting one apart than for the products.
    kernels = split_heads(self.qkv.kernel[...], self.config.heads, 3)
    biases = split_heads(self.qkv.bias[...], self.config.heads, 3) if self.qkv.bias is not None else [None] * 3
    q, k, v = (
      linear(x, kernel, bias, self.qkv.axes, self.qkv.dtype).reshape(rows, length, self.config.heads, -1)
      for kernel, bias in zip(kernels, biases, strict=True)
    )
    if self.config.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    if self.config.qk_norm == "full":
      q, k = (
        norm(part.reshape(rows, length, width)).reshape(part.shape)
        for norm, part in ((self.q_norm, q), (self.k_norm, k))
      )
    mixed = attend(q, k, v, causal=self.config.causal, mask=mask)
    return self.out(mixed.reshape(rows, length, width))
