"""Self-attention: one fused kernel for queries, keys and values, and one function that attends."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.models.attention_kernels import by_platform
from contrastive_jax.models.attention_rows import LONGEST, attend_in_rows
from contrastive_jax.models.attention_xla import blockwise, dense
from contrastive_jax.models.config import TransformerConfig
from contrastive_jax.models.layers import Linear, Norm, ParameterMaker, kernel_init, linear
from contrastive_jax.models.positions import rotate
from contrastive_jax.parallel.mesh import BATCH_AXES
from contrastive_jax.parallel.placement import platform

# Tokens of the longest row whose logits are held at once.
DENSE_LENGTH = 1024


def attend(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  mask: Bool[Array, "rows #length length"] | None = None,
  segment_ids: Int[Array, "rows length"] | None = None,
  sigmoid_length: int = 0,
  in_rows: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
  """Computes scaled dot-product attention in float32; a token sees what every rule given lets it see.

  Args:
    queries: the query of each token and head.
    keys: the key of each token and head.
    values: the value of each token and head.
    causal: whether a token sees only itself and the tokens before it.
    mask: True where the query (second axis) sees the key (third axis).
    segment_ids: the segment of each token, which sees those of its own segment. Padding is a segment like any other.
    sigmoid_length: the n of the weights `sigmoid(logit - log n)`, which replace the softmax and do not sum to one
      (arXiv 2409.04431); 0 is the softmax.
    in_rows: whether rows attend in the kernel for short ones, where `runs_in_rows` says that they can.

  Returns:
    The weighted mean (with a sigmoid: the weighted sum) of the values that each token sees.

  The logits of rows of up to `DENSE_LENGTH` tokens exist all at once, with `in_rows` within a kernel. Longer rows take
  memory linear in their length: they run in the kernel of the platform, or block by block in XLA where there is none
  (CPU, `mask`, sigmoid).

  Examples:
    >>> q = k = jnp.zeros((1, 3, 1, 2))  # Equal logits: each token takes the mean of what it sees.
    >>> v = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1).repeat(2, axis=3)
    >>> attend(q, k, v, causal=True)[0, :, 0, 0].tolist()
    [1.0, 2.0, 4.0]
    >>> attend(q, k, v, segment_ids=jnp.array([[1, 1, 2]]))[0, :, 0, 0].tolist()
    [2.0, 2.0, 8.0]
  """
  rules = {"causal": causal, "sigmoid_length": sigmoid_length}
  length, heads = queries.shape[1:3]
  if length <= DENSE_LENGTH and not in_rows:
    return dense(queries, keys, values, mask=mask, segment_ids=segment_ids, **rules)

  def attend_rows(queries, keys, values, mask, segment_ids):
    if in_rows:
      flat = (part.reshape(*part.shape[:2], -1) for part in (queries, keys, values))
      mixed = attend_in_rows(*flat, segment_ids, queries.shape[2], causal)
      return mixed.reshape(queries.shape)
    if mask is not None or sigmoid_length:
      return blockwise(queries, keys, values, mask=mask, segment_ids=segment_ids, **rules)
    return by_platform(queries, keys, values, causal=causal, segment_ids=segment_ids)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attend_rows(queries, keys, values, mask, segment_ids)
  # The partitioner cannot take a kernel apart, and would gather the rows that a loop over blocks passes through.
  rows = PartitionSpec(BATCH_AXES)
  tokens = PartitionSpec(BATCH_AXES, None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
  split = jax.shard_map(
    attend_rows, mesh=mesh, in_specs=(tokens, tokens, tokens, rows, rows), out_specs=tokens, check_vma=False
  )
  return split(queries, keys, values, mask, segment_ids)


def runs_in_rows(length: int, mask: Any, sigmoid_length: int) -> bool:
  """Says whether rows are short enough for the kernel that `attend` has for them, and follow rules that it knows."""
  return platform() == "tpu" and length <= LONGEST and mask is None and not sigmoid_length


def fuse_heads(parts: list[Any], heads: int) -> Any:
  """Joins kernels or biases `[..., heads * head_dim]` of several projections, head by head.

  The columns are ordered (head, part, feature) so that splitting them over devices splits heads.
  """
  split = [part.reshape(*part.shape[:-1], heads, 1, -1) for part in parts]
  joined = jnp.concatenate(split, axis=-2)
  return joined.reshape(*parts[0].shape[:-1], -1)


def by_head(fused: Any, heads: int, parts: int) -> list[Any]:
  """Returns the kernels or biases `[..., heads, head_dim]` of the several projections that `fuse_heads` joined."""
  split = fused.reshape(*fused.shape[:-1], heads, parts, -1)
  return [split[..., part, :] for part in range(parts)]


def split_heads(fused: Any, heads: int, parts: int) -> list[Any]:
  """Undoes `fuse_heads`: returns the kernels or biases of the several projections."""
  return [part.reshape(*fused.shape[:-1], -1) for part in by_head(fused, heads, parts)]


def project(
  layer: Linear, x: Float[Array, "... width"], heads: int, parts: int, *, side_by_side: bool = False
) -> list[Float[Array, "..."]]:
  """Applies the several projections that a layer holds, fused.

  They are a product each: a TPU pays more for cutting one apart than for the products.

  Args:
    layer: the fused projections.
    x: the features of each token.
    heads: number of heads.
    parts: number of projections.
    side_by_side: whether the features of all heads become one axis.

  Returns:
    Of each projection `[..., heads, head_dim]`, or `[..., heads * head_dim]`.
  """
  split, axes = (split_heads, layer.axes) if side_by_side else (by_head, (*layer.axes, None))
  kernels = split(layer.kernel[...], heads, parts)
  biases = [None] * parts if layer.bias is None else split(layer.bias[...], heads, parts)
  if side_by_side and layer.bias is not None:
    products = (linear(x, kernel, None, axes, layer.dtype) for kernel in kernels)
    return [_with_bias(product, bias) for product, bias in zip(products, biases, strict=True)]
  return [linear(x, kernel, bias, axes, layer.dtype) for kernel, bias in zip(kernels, biases, strict=True)]


@jax.custom_vjp
def _with_bias(x: Float[Array, "rows length width"], bias: Float[Array, "width"]) -> Float[Array, "rows length width"]:
  """Adds a bias whose gradient is a matrix product with ones.

  A TPU takes twenty times as long for the sum over tokens, unless it is part of the kernel that makes what is summed.
  """
  return x + bias.astype(x.dtype)


def _with_bias_backward(_, cotangent):
  # As many rows of ones as a tile has: the compiler would turn a single one into the sum.
  ones = jnp.ones((8, *cotangent.shape[:2]), cotangent.dtype)
  exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
  return cotangent, jnp.einsum("orl,rlw->ow", ones, cotangent, **exact)[0]


_with_bias.defvjp(lambda x, bias: (_with_bias(x, bias), None), _with_bias_backward)


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

  @jax.named_scope("attention")
  def __call__(
    self,
    x: Float[Array, "rows length width"],
    *,
    mask: Bool[Array, "rows #length length"] | None = None,
    segment_ids: Int[Array, "rows length"] | None = None,
    angles: Float[Array, "rows length half_head_dim"] | None = None,
  ) -> Float[Array, "rows length width"]:
    """Lets the tokens of each row attend to each other.

    Args:
      x: the tokens.
      mask: True where the query (second axis) sees the key (third axis); None lets all see all.
      segment_ids: the segment of each token, which sees the tokens of its own segment.
      angles: the rotary angles of each token, as `positions.rope_angles` makes them.
    """
    rows, length, width = x.shape
    sigmoid_length = self.config.attention_length if self.config.attention == "sigmoid" else 0
    # As the kernel for short rows reads and writes heads, so that nothing moves them between it and the projections.
    in_rows = self.config.attention_kernel and runs_in_rows(length, mask, sigmoid_length)
    with jax.named_scope("qkv"):
      projected = project(self.qkv, x, self.config.heads, 3, side_by_side=in_rows)
    q, k, v = (checkpoint_name(part, "qkv").reshape(rows, length, self.config.heads, -1) for part in projected)
    if self.config.qk_norm == "head":
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    if self.config.qk_norm == "full":
      q, k = (norm(part.reshape(x.shape)).reshape(part.shape) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
    with jax.named_scope("attend"):
      seen = {"causal": self.config.causal, "mask": mask, "segment_ids": segment_ids}
      mixed = attend(q, k, v, **seen, sigmoid_length=sigmoid_length, in_rows=in_rows)
    mixed = checkpoint_name(mixed.reshape(rows, length, width) if in_rows else mixed, "mix")
    with jax.named_scope("out"):
      if in_rows:
        return self.out(mixed)
      kernel = self.out.kernel[...].reshape(*mixed.shape[2:], width)
      return linear(mixed, kernel, self.out.bias[...], ("heads", None, "embed"), self.out.dtype, over=2)
