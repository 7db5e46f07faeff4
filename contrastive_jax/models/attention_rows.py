"""Softmax attention of short rows on a TPU: a Pallas kernel in which a row lies in fast memory from beginning to end.

The logits of a row never leave the chip, and queries, keys and values are read as the projections write them, heads
side by side, where XLA moves heads to the front, and logits to memory and back.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from contrastive_jax.models.attention_xla import MASKED

# Tokens of the longest row whose logits, of several heads at a time, fit fast memory.
LONGEST = 384
_LANES = 128
# Bytes of fast memory that every kernel may take.
_MEMORY = 2**24


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend_in_rows(
  queries: Float[Array, "rows length width"],
  keys: Float[Array, "rows length width"],
  values: Float[Array, "rows length width"],
  segment_ids: Int[Array, "rows length"] | None,
  heads: int,
  causal: bool = False,
  interpret: bool = False,
) -> Float[Array, "rows length width"]:
  """Computes scaled dot-product attention, with logits and sums in float32.

  Args:
    queries: the queries of all heads, side by side.
    keys: the keys.
    values: the values.
    segment_ids: the segment of each token, which sees those of its own segment; None lets all see all.
    heads: number of heads.
    causal: whether a token sees only itself and the tokens before it.
    interpret: whether the kernel runs anywhere, slowly.

  Returns:
    The weighted means of the values, heads side by side.
  """
  forward = functools.partial(_forward, heads=heads, causal=causal, scale=_scale(queries, heads))
  sizes = {"outputs": 1, "products": 2, "heads": heads}
  return _call(forward, (queries, keys, values), segment_ids, **sizes, interpret=interpret)[0]


def _attend_forward(queries, keys, values, segment_ids, heads, causal, interpret):
  mixed = attend_in_rows(queries, keys, values, segment_ids, heads, causal, interpret)
  return mixed, (queries, keys, values, segment_ids)


def _attend_backward(heads, causal, interpret, residuals, cotangent):
  *parts, segment_ids = residuals
  backward = functools.partial(_backward, heads=heads, causal=causal, scale=_scale(parts[0], heads))
  sizes = {"outputs": 3, "products": 5, "heads": heads}
  return *_call(backward, (*parts, cotangent), segment_ids, **sizes, interpret=interpret), None


attend_in_rows.defvjp(_attend_forward, _attend_backward)


def _scale(queries: Float[Array, "rows length width"], heads: int) -> float:
  return (queries.shape[-1] // heads) ** -0.5


def _call(
  kernel: Callable,
  parts: tuple[Float[Array, "rows length width"], ...],
  segment_ids: Int[Array, "rows length"] | None,
  *,
  outputs: int,
  products: int,
  heads: int,
  interpret: bool,
) -> Sequence[Float[Array, "rows length width"]]:
  """Runs a kernel on one row after the other.

  Args:
    kernel: the kernel, of one row of each part, its segment ids along both axes if there are any, and its outputs.
    parts: what the kernel reads.
    segment_ids: the segment of each token.
    outputs: number of arrays that it writes, of the shape of the parts.
    products: number of products of logits' size for each head.
    heads: number of heads.
    interpret: whether the kernel runs anywhere, slowly.
  """
  rows, length, width = parts[0].shape
  tokens = pl.BlockSpec((None, length, width), lambda row: (row, 0, 0))
  inputs, specs = list(parts), [tokens] * len(parts)
  if segment_ids is not None:
    ids = segment_ids.astype(jnp.int32)
    # By query and by key, since turning a column into a row costs a pass.
    inputs += [ids[:, :, None], ids[:, None, :]]
    specs += [
      pl.BlockSpec((None, length, 1), lambda row: (row, 0, 0)),
      pl.BlockSpec((None, 1, length), lambda row: (row, 0, 0)),
    ]
  moved = (len(parts) + outputs) * parts[0].size * parts[0].dtype.itemsize
  # What the matrix units spend, which multiply whole tiles.
  full = math.ceil(length / _LANES) * _LANES
  # Each array twice, one being read or written while the other is used, and what heads make of their logits.
  held = 2 * moved // rows + 48 * 4 * length * full
  lanes = sum(window.stop - window.start for window, _ in _windows(width, heads))
  call = pl.pallas_call(
    functools.partial(kernel, segmented=segment_ids is not None),
    grid=(rows,),
    in_specs=specs,
    out_specs=[tokens] * outputs,
    out_shape=[jax.ShapeDtypeStruct(parts[0].shape, parts[0].dtype)] * outputs,
    cost_estimate=pl.CostEstimate(
      flops=rows * products * 2 * length * full * lanes,
      transcendentals=rows * heads * length * full,
      bytes_accessed=moved,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=max(_MEMORY, held)),
    interpret=interpret,
  )
  return call(*inputs)


def _windows(width: int, heads: int) -> Iterator[tuple[slice, Callable[[], Array | None]]]:
  """Yields of each head the whole tiles of lanes that hold it, and a function that says which of those are its own.

  Lanes of other heads are set to zero on one side of a product, which costs nothing, as tiles are multiplied whole.
  """
  head_dim = width // heads
  for head in range(heads):
    first, last = head * head_dim, (head + 1) * head_dim
    start, stop = first // _LANES * _LANES, min(math.ceil(last / _LANES) * _LANES, width)

    def own(first=first - start, last=last - start, size=stop - start):
      if size == last - first:
        return None
      lane = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
      return (first <= lane) & (lane < last)

    yield slice(start, stop), own


def _only(own: Array | None, x: Array) -> Array:
  """Sets the lanes of other heads to zero."""
  return x if own is None else jnp.where(own, x, jnp.zeros_like(x))


def _product(left: Array, right: Array, over: tuple[int, int]) -> Array:
  return jax.lax.dot_general(left, right, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _seen(length: int, refs: list, causal: bool) -> Array | None:
  seen = None
  if refs:
    by_query, by_key = refs
    seen = by_query[...] == by_key[...]
  if causal:
    query, key = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    seen = query >= key if seen is None else seen & (query >= key)
  return seen


def _weights(queries: Array, keys: Array, seen: Array | None, scale: float) -> tuple[Array, Array]:
  """Returns the exponentials of a head's logits, less the largest of each query, and one over their sums."""
  logits = _product(queries, keys, (1, 1)) * scale
  if seen is not None:
    logits = jnp.where(seen, logits, MASKED)
  exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return exponentials, 1 / jnp.sum(exponentials, axis=1, keepdims=True)


def _forward(queries, keys, values, *refs, heads, causal, scale, segmented):
  *ids, mixed = refs
  seen = _seen(queries.shape[0], ids if segmented else [], causal)
  for window, lanes in _windows(queries.shape[1], heads):
    own = lanes()
    exponentials, share = _weights(_only(own, queries[:, window]), keys[:, window], seen, scale)
    of_head = _product(exponentials.astype(values.dtype), values[:, window], (1, 0)) * share
    _store(mixed, window, own, of_head)


def _backward(queries, keys, values, cotangent, *refs, heads, causal, scale, segmented):
  *ids, by_query, by_key, by_value = refs
  seen = _seen(queries.shape[0], ids if segmented else [], causal)
  for window, lanes in _windows(queries.shape[1], heads):
    own, dtype = lanes(), queries.dtype
    q, k, v, slope = (ref[:, window] for ref in (queries, keys, values, cotangent))
    exponentials, share = _weights(_only(own, q), k, seen, scale)
    weights = exponentials * share
    of_weights = _product(_only(own, slope), v, (1, 1))
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
    if seen is not None:
      of_logits = jnp.where(seen, of_logits, 0.0)  # For queries that see nothing, whose weights are not 0.
    of_logits = (of_logits * scale).astype(dtype)
    _store(by_query, window, own, _product(of_logits, k, (1, 0)))
    _store(by_key, window, own, _product(of_logits, q, (0, 0)))
    _store(by_value, window, own, _product(weights.astype(dtype), slope, (0, 0)))


def _store(ref, window: slice, own: Array | None, x: Array) -> None:
  """Writes a head's lanes of a window; the heads before it have written theirs."""
  x = x.astype(ref.dtype)
  ref[:, window] = x if own is None else jnp.where(own, x, ref[:, window])
