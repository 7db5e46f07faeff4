"""Softmax attention that never holds the logits of a whole row: the fused kernel of each platform, or blocks in XLA.

The kernels are JAX's own, written in Pallas: splash attention on TPUs, FlashAttention-2 (arXiv 2307.08691) in Triton on
NVIDIA GPUs. Neither is partitioned by the compiler: a mesh must be taken apart around them, see `attention.attend`.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as triton_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.models.attention_xla import blockwise

# Both kernels cut rows into blocks of a multiple of this many tokens.
_LANES = 128
_SPLASH_BLOCKS = (
  "block_q",
  "block_kv",
  "block_kv_compute",
  "block_q_dkv",
  "block_kv_dkv",
  "block_kv_dkv_compute",
  "block_q_dq",
  "block_kv_dq",
)


def by_platform(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  segment_ids: Int[Array, "rows length"] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
  """Runs what is fastest on the platform, decided when the program is compiled, also for devices that are not here."""

  def run(function):
    return lambda queries, keys, values, segment_ids: function(
      queries, keys, values, causal=causal, segment_ids=segment_ids
    )

  return jax.lax.platform_dependent(
    queries, keys, values, segment_ids, tpu=run(splash), cuda=run(triton), default=run(blockwise)
  )


def splash(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  segment_ids: Int[Array, "rows length"] | None = None,
  interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
  """Runs splash attention on a TPU, which skips blocks of which no query sees a key.

  It takes the arguments of `attention.attend`; `interpret` runs the kernel anywhere, slowly.
  """
  length, head_dim = queries.shape[1], queries.shape[3]
  # The kernel does not scale the logits.
  parts, segment_ids = _fill_up((queries * head_dim**-0.5, keys, values), segment_ids)
  padded = parts[0].shape[1]
  block = next(size for size in (512, 384, 256, _LANES) if padded % size == 0)

  def row(parts):
    *parts, own = parts
    seen = _seen_blocks(own, padded // block, causal=causal)
    by_query, by_key = (_mask_info(seen, axis, padded if causal else 0) for axis in (2, 1))
    kernel = splash_attention_kernel.SplashAttentionKernel(
      by_query,
      by_query,
      by_key,
      is_mqa=False,
      save_residuals=False,
      mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      residual_checkpoint_name=None,
      mask_function=_earlier if causal else None,
      block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(_SPLASH_BLOCKS, block)),
      interpret=interpret,
    )
    ids = None if own is None else splash_attention_kernel.SegmentIds(own, own)
    mixed = kernel(*(jnp.swapaxes(part, 0, 1) for part in parts), segment_ids=ids)
    return jnp.swapaxes(mixed, 0, 1)

  inputs = (*parts, segment_ids)
  # What is skipped differs from row to row, and one row fills the chip.
  mixed = jax.vmap(row)(inputs) if segment_ids is None else jax.lax.map(row, inputs)
  return mixed[:, :length]


def _earlier(query, key):
  return query >= key


def _seen_blocks(
  segment_ids: Int[Array, "length"] | None, count: int, *, causal: bool
) -> Bool[Array, "1 query_blocks key_blocks"]:
  """Says which blocks of keys each block of queries may see, judged by the ranges of their segments and their order."""
  seen = jnp.tri(count, dtype=bool) if causal else jnp.ones((count, count), bool)
  if segment_ids is not None:
    blocks = segment_ids.reshape(count, -1)
    lowest, highest = jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)
    seen &= (lowest[:, None] <= highest) & (lowest <= highest[:, None])
  return seen[None]


def _mask_info(seen: Bool[Array, "1 query_blocks key_blocks"], axis: int, causal_length: int) -> MaskInfo:
  """Makes what splash attention reads for each pair of blocks when it runs along `axis`.

  Args:
    seen: which pairs of blocks to compute.
    axis: the axis that the kernel sums over: keys (2) for outputs and gradients by queries, queries (1) for those by
      keys.
    causal_length: number of tokens of a causal row; 0 is not causal.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis)
  # While blocks are skipped the next one is fetched, and in the end nothing: each block sees itself.
  following = jax.lax.cummin(jnp.where(seen, index, seen.shape[axis]), axis=axis, reverse=True)
  last = jnp.max(jnp.where(seen, index, 0), axis=axis, keepdims=True)
  return MaskInfo(
    data_next=jnp.minimum(following, last),
    mask_next=None,
    block_mask=seen.astype(jnp.int32),
    partial_mask_blocks=None,
    q_sequence=jnp.arange(causal_length, dtype=jnp.int32) if causal_length else None,
  )


def triton(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  segment_ids: Int[Array, "rows length"] | None = None,
  interpret: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
  """Runs FlashAttention-2 on an NVIDIA GPU.

  It takes the arguments of `attention.attend`; `interpret` runs the kernel anywhere, slowly.
  """
  length, head_dim = queries.shape[1], queries.shape[3]
  parts, segment_ids = _fill_up((queries, keys, values), segment_ids)
  mixed = triton_attention.mha(*parts, segment_ids, sm_scale=head_dim**-0.5, causal=causal, interpret=interpret)
  return mixed[:, :length]


def _fill_up(parts, segment_ids):
  """Pads rows to whole blocks; the tokens added are a segment of their own."""
  missing = -parts[0].shape[1] % _LANES
  if segment_ids is not None:
    segment_ids = segment_ids.astype(jnp.int32)
  if missing:
    if segment_ids is None:
      segment_ids = jnp.zeros(parts[0].shape[:2], jnp.int32)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=-1)
    parts = tuple(jnp.pad(part, ((0, 0), (0, missing), (0, 0), (0, 0))) for part in parts)
  return parts, segment_ids
