"""From token states to one vector an image or caption, with sums in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.models.attention_xla import MASKED
from contrastive_jax.models.config import TransformerConfig
from contrastive_jax.models.layers import Linear, Mlp, ParameterMaker, kernel_init, make_norm, xavier_uniform
from contrastive_jax.parallel.mesh import BATCH_AXES


class Tokens:
  """Which tokens belong to each pair: what its sums, means and softmaxes run over.

  Every row is a pair's, whole or as far as a mask says; or rows are packed, and a pair's tokens are a segment of a row.
  Packed rows are pooled on the device they lie on: their pairs lie there too.
  """

  def __init__(self, mask: Any = None, *, segments: Any = None, slots: Any = None):
    """Takes what says so.

    Args:
      mask: bool `[rows, length]`; None is all.
      segments: of packed rows, `[rows, length]`, 0 is padding.
      slots: of packed rows, `[pairs, 2]`, the (row, segment) of each pair.
    """
    self.mask, self.segments, self.slots = mask, segments, slots

  @classmethod
  def of(cls, segments: Any, slots: Any) -> "Tokens":
    """From the fields of a batch: rows of one pair each may have segments that mark their padding."""
    if slots is None:
      return cls(None if segments is None else segments > 0)
    return cls(segments=segments, slots=slots)

  def with_first(self) -> "Tokens":
    """The same after a token was put before each row, whose pair it belongs to."""
    return Tokens(None if self.mask is None else jnp.pad(self.mask, ((0, 0), (1, 0)), constant_values=True))

  def mean(self, states: Float[Array, "rows length width"]) -> Float[Array, "pairs width"]:
    """Mean over the tokens of each pair."""
    states = states.astype(jnp.float32)
    if self.slots is not None:
      ones = jnp.ones((*states.shape[:2], 1), jnp.float32)
      total = self._on_each_device(_sums, jnp.concatenate([states, ones], axis=2))
      return total[:, :-1] / jnp.maximum(total[:, -1:], 1)
    if self.mask is None:
      return jnp.mean(states, axis=1)
    weights = self.mask.astype(jnp.float32)[..., None]
    return jnp.sum(states * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)

  def attend(
    self, logits: Float[Array, "rows length heads"], values: Float[Array, "rows length heads head_dim"]
  ) -> Float[Array, "pairs heads head_dim"]:
    """Mean of each pair's values, weighted by a softmax over its tokens, for each head."""
    values = values.astype(jnp.float32)
    if self.slots is not None:
      return self._on_each_device(_attended, logits, values)
    if self.mask is not None:
      logits = jnp.where(self.mask[..., None], logits, MASKED)
    return jnp.einsum("rlh,rlhd->rhd", jax.nn.softmax(logits, axis=1), values)

  def select(self, states: Float[Array, "rows length width"], which: str) -> Float[Array, "pairs width"]:
    """The "first" or the "last" token of each pair."""
    if self.slots is not None:
      return self._on_each_device(functools.partial(_selected, which=which), states)
    if which == "first":
      return states[:, 0]
    if self.mask is None:
      return states[:, -1]
    return jnp.take_along_axis(states, last_true(self.mask)[:, None, None], axis=1)[:, 0]

  def _on_each_device(self, function: Callable[..., Array], *values: Array) -> Array:
    """Calls `function(segments, slots, *values)` with the rows and pairs of one device, whose slots count its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    segments, slots = jnp.asarray(self.segments, jnp.int32), jnp.asarray(self.slots, jnp.int32)
    if mesh.empty:
      return function(segments, slots, *values)

    def local(segments, slots, *values):
      first = jax.lax.axis_index(BATCH_AXES) * segments.shape[0]
      return function(segments, slots - jnp.array([1, 0]) * first, *values)

    rows = PartitionSpec(BATCH_AXES)
    split = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(segments, slots, *values)


def last_true(mask: Bool[Array, "rows length"]) -> Int[Array, "rows"]:
  """Position of the last True of each row; 0 where there is none."""
  return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)


def _owned(segments: Array, slots: Array) -> Bool[Array, "pairs rows length"]:
  """Whose each token is."""
  rows = jnp.arange(segments.shape[0])
  return (slots[:, 0, None, None] == rows[:, None]) & (slots[:, 1, None, None] == segments)


def _sums(segments: Array, slots: Array, values: Array) -> Array:
  """Sums over the tokens of each pair, as one matrix product: a TPU is slow at scattering."""
  owned = _owned(segments, slots).astype(values.dtype)
  return jnp.einsum("prl,rl...->p...", owned, values, precision=jax.lax.Precision.HIGHEST)


def _attended(segments: Array, slots: Array, logits: Array, values: Array) -> Array:
  pairs = slots.shape[0]
  # Tokens of no pair, the padding, go to one more.
  owner = jnp.full((segments.shape[0], segments.shape[1] + 1), pairs, jnp.int32)
  owner = owner.at[slots[:, 0], slots[:, 1]].set(jnp.arange(pairs, dtype=jnp.int32)).at[:, 0].set(pairs)
  owner = jnp.take_along_axis(owner, segments, axis=1)
  flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
  highest = jax.ops.segment_max(flat, owner.reshape(-1), pairs + 1)
  weights = jnp.exp(jnp.where(owner[..., None] < pairs, logits - highest[owner], MASKED))
  weighted = jnp.concatenate([weights[..., None] * values, weights[..., None]], axis=-1)
  total = _sums(segments, slots, weighted)
  return total[..., :-1] / total[..., -1:]


def _selected(segments: Array, slots: Array, states: Array, *, which: str) -> Array:
  mine = segments[slots[:, 0]] == slots[:, 1, None]
  index = jnp.argmax(mine, axis=1) if which == "first" else last_true(mine)
  return states[slots[:, 0], index]


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
    self.norm = make_norm(config, make=make)
    self.mlp = Mlp(config, dtype=dtype, make=make)

  def __call__(self, states: Float[Array, "rows length width"], tokens: Tokens) -> Float[Array, "pairs width"]:
    """Pools the tokens of each pair."""
    rows, length, _ = states.shape
    heads, head_dim = self.config.heads, self.config.head_dim
    query = self.q(self.probe[...]).reshape(heads, head_dim)
    kv = self.kv(states).reshape(rows, length, heads, 2, head_dim)
    keys, values = kv[..., 0, :], kv[..., 1, :]
    logits = jnp.einsum("rlhd,hd->rlh", keys, query * head_dim**-0.5, preferred_element_type=jnp.float32)
    pooled = tokens.attend(logits, values)
    x = self.out(pooled.reshape(pooled.shape[0], -1))
    return x + self.mlp(self.norm(x))
