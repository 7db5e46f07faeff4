"""Attention in plain XLA: all queries of a row at once, or one block of them after the other in linear memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.parallel.placement import platform

# Logit of what is not seen. Finite, so that a query without any visible key gives a mean and not a NaN.
MASKED = -1e30

# Keys up to which passes over the logits cost a TPU less than making them again.
_FEW_KEYS = 128

# Logits of one block, a row and head: small enough to lie beside a model, large enough for a matrix product.
_BLOCK_LOGITS = 2**19


def dense(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  mask: Bool[Array, "rows #length length"] | None = None,
  segment_ids: Int[Array, "rows length"] | None = None,
  sigmoid_length: int = 0,
) -> Float[Array, "rows length heads head_dim"]:
  """Computes attention with the logits of all pairs of tokens at once; it takes the arguments of `attention.attend`."""
  # Heads first, for both products and their gradients: on CPU twice as fast as leaving the order to einsum.
  queries, keys, values = (jnp.swapaxes(part, 1, 2) for part in (queries, keys, values))
  index = jnp.arange(keys.shape[2])
  seen = _seen(index, index, segment_ids, segment_ids, mask, causal=causal)
  if platform() == "tpu" and keys.shape[2] > _FEW_KEYS and not sigmoid_length:
    mixed = mix_in_few_passes(queries, keys, values, seen)
  else:
    mixed = _mix(queries, keys, values, seen, sigmoid_length)
  return jnp.swapaxes(mixed, 1, 2)


def blockwise(
  queries: Float[Array, "rows length heads head_dim"],
  keys: Float[Array, "rows length heads head_dim"],
  values: Float[Array, "rows length heads head_dim"],
  *,
  causal: bool = False,
  mask: Bool[Array, "rows #length length"] | None = None,
  segment_ids: Int[Array, "rows length"] | None = None,
  sigmoid_length: int = 0,
  block: int | None = None,
) -> Float[Array, "rows length heads head_dim"]:
  """Computes what `dense` does, one block of queries after the other; the backward pass computes their logits again.

  It takes the arguments of `attention.attend`, and `block`: the number of queries whose logits
  `[rows, heads, block, length]` exist at once; None chooses.
  """
  rows, length, heads, head_dim = queries.shape
  block = min(length, block or max(_BLOCK_LOGITS // length, 16))
  count = math.ceil(length / block)

  def cut(part: Any) -> Any:
    """`[rows, length, ...]` to `[count, rows, block, ...]`; what fills up the last block is dropped in the end."""
    part = jnp.pad(part, ((0, 0), (0, count * block - length), *((0, 0),) * (part.ndim - 2)))
    return jnp.moveaxis(part.reshape(rows, count, block, *part.shape[2:]), 1, 0)

  keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
  by_query = mask is not None and mask.shape[1] > 1

  @jax.checkpoint
  def mix_block(part):
    queries, index, own, own_mask = part
    seen = _seen(index, jnp.arange(length), own, segment_ids, own_mask if by_query else mask, causal=causal)
    return jnp.swapaxes(_mix(jnp.swapaxes(queries, 1, 2), keys, values, seen, sigmoid_length), 1, 2)

  index = jnp.arange(count * block).reshape(count, block)
  own = None if segment_ids is None else cut(segment_ids)
  mixed = jax.lax.map(mix_block, (cut(queries), index, own, cut(mask) if by_query else None))
  return jnp.moveaxis(mixed, 0, 1).reshape(rows, count * block, heads, head_dim)[:, :length]


def _seen(
  query_index: Int[Array, "queries"],
  key_index: Int[Array, "keys"],
  query_segments: Int[Array, "rows queries"] | None,
  key_segments: Int[Array, "rows keys"] | None,
  mask: Bool[Array, "rows #queries keys"] | None,
  *,
  causal: bool,
) -> Bool[Array, "... #queries keys"] | None:
  """Says which keys each query sees; None when it is all of them."""
  seen = None if mask is None else mask[:, None]
  if query_segments is not None:
    own = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    seen = own if seen is None else seen & own
  if causal:
    earlier = query_index[:, None] >= key_index
    seen = earlier if seen is None else seen & earlier
  return seen


def _mix(
  queries: Float[Array, "rows heads queries head_dim"],
  keys: Float[Array, "rows heads keys head_dim"],
  values: Float[Array, "rows heads keys head_dim"],
  seen: Bool[Array, "... #queries keys"] | None,
  sigmoid_length: int,
) -> Float[Array, "rows heads queries head_dim"]:
  logits = _logits(queries, keys, seen)
  weights = jax.nn.sigmoid(logits - math.log(sigmoid_length)) if sigmoid_length else jax.nn.softmax(logits, axis=-1)
  return jnp.einsum("rhqk,rhkd->rhqd", weights.astype(values.dtype), values)


def _logits(
  queries: Float[Array, "rows heads queries head_dim"],
  keys: Float[Array, "rows heads keys head_dim"],
  seen: Bool[Array, "... #queries keys"] | None,
) -> Float[Array, "rows heads queries keys"]:
  scale = queries.shape[-1] ** -0.5
  logits = jnp.einsum("rhqd,rhkd->rhqk", queries * scale, keys, preferred_element_type=jnp.float32)
  return logits if seen is None else jnp.where(seen, logits, MASKED)


@jax.custom_vjp
def mix_in_few_passes(
  queries: Float[Array, "rows heads queries head_dim"],
  keys: Float[Array, "rows heads keys head_dim"],
  values: Float[Array, "rows heads keys head_dim"],
  seen: Bool[Array, "... #queries keys"] | None,
) -> Float[Array, "rows heads queries head_dim"]:
  """Computes softmax attention for TPUs, whose time goes into reading and writing logits and not into products.

  The backward pass makes the weights again, and what it hands on is stored once, in the dtype of the queries.
  """
  return _few_passes_forward(queries, keys, values, seen)[0]


def _few_passes_forward(queries, keys, values, seen):
  logits = _logits(queries, keys, seen)
  # Without the barrier the logits minus their maximum would be stored too.
  largest = lax.optimization_barrier(jnp.max(logits, axis=-1, keepdims=True))
  exponentials = jnp.exp(logits - largest).astype(values.dtype)
  # With a feature of ones the product that mixes the values also sums the exponentials.
  extended = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
  sums = jnp.einsum("rhqk,rhkd->rhqd", exponentials, extended, preferred_element_type=jnp.float32)
  share = 1 / sums[..., -1:]
  mixed = (sums[..., :-1] * share).astype(values.dtype)
  # What the backward pass needs of the logits, so that who keeps the mix does not need them again.
  mixed, largest, share = (checkpoint_name(part, "mix") for part in (mixed, largest, share))
  return mixed, (queries, keys, values, seen, mixed, largest, share)


def _few_passes_backward(residuals, cotangent):
  queries, keys, values, seen, mixed, largest, share = residuals
  weights = jnp.exp(_logits(queries, keys, seen) - largest) * share
  mean_slope = jnp.sum(cotangent.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
  slopes = jnp.einsum("rhqd,rhkd->rhqk", cotangent, values, preferred_element_type=jnp.float32)
  slopes = weights * (slopes - lax.optimization_barrier(mean_slope))
  if seen is not None:
    slopes = jnp.where(seen, slopes, 0)  # For queries that see nothing, whose weights are not 0.
  # Two products read them: without the barrier each would make them again.
  slopes = lax.optimization_barrier(slopes.astype(queries.dtype))
  scale = queries.shape[-1] ** -0.5
  by_query = jnp.einsum("rhqk,rhkd->rhqd", slopes, keys) * scale
  by_key = jnp.einsum("rhqk,rhqd->rhkd", slopes, queries * scale)
  by_value = jnp.einsum("rhqk,rhqd->rhkd", weights.astype(values.dtype), cotangent)
  return by_query, by_key, by_value, None


mix_in_few_passes.defvjp(_few_passes_forward, _few_passes_backward)
