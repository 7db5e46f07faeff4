"""Pooling: from token states to one vector for each image or caption, with sums in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from contrastive_jax.models.attention import project
from contrastive_jax.models.attention_xla import MASKED
from contrastive_jax.models.config import TransformerConfig
from contrastive_jax.models.layers import Linear, Mlp, ParameterMaker, kernel_init, make_norm, xavier_uniform
from contrastive_jax.parallel.mesh import BATCH_AXES


class Tokens:
  """Says which tokens belong to each pair, over which its sums, means and softmaxes run.

  Either a row belongs to one pair, whole or as far as a mask says, or rows are packed and a pair owns a segment of a
  row. Packed rows are pooled on the device they lie on, since their pairs lie there too.

  Examples:
    >>> states = jnp.arange(4.0).reshape(1, 4, 1)
    >>> Tokens(jnp.array([[True, True, False, False]])).mean(states).tolist()
    [[0.5]]
    >>> packed = Tokens(segment_ids=jnp.array([[1, 1, 2, 2]]), locations=jnp.array([[0, 1], [0, 2]]))
    >>> packed.mean(states).tolist(), packed.select(states, "last").tolist()
    ([[0.5], [2.5]], [[1.0], [3.0]])
  """

  def __init__(self, mask: Any = None, *, segment_ids: Any = None, locations: Any = None):
    """Takes a mask for rows of one pair each, or segment ids and locations for packed rows.

    Args:
      mask: bool `[rows, length]`, True on the tokens of the row's pair; None when all are.
      segment_ids: the segment of each token of packed rows, `[rows, length]`; 0 is padding.
      locations: the (row, segment) of each pair in packed rows, `[pairs, 2]`.
    """
    self.mask, self.segment_ids, self.locations = mask, segment_ids, locations

  @classmethod
  def of(cls, segment_ids: Any, locations: Any) -> "Tokens":
    """Makes it from the fields of a batch, where rows of one pair each may have segment ids that mark their padding."""
    if locations is None:
      return cls(None if segment_ids is None else segment_ids > 0)
    return cls(segment_ids=segment_ids, locations=locations)

  def with_first(self) -> "Tokens":
    """Returns the same tokens after one was put before each row, which belongs to the row's pair."""
    return Tokens(None if self.mask is None else jnp.pad(self.mask, ((0, 0), (1, 0)), constant_values=True))

  def mean(self, states: Float[Array, "rows length width"]) -> Float[Array, "pairs width"]:
    """Averages the states of each pair's tokens."""
    states = states.astype(jnp.float32)
    if self.locations is not None:
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
    """Averages each pair's values, weighted by a softmax over its tokens, for each head."""
    values = values.astype(jnp.float32)
    if self.locations is not None:
      return self._on_each_device(_attended, logits, values)
    if self.mask is not None:
      logits = jnp.where(self.mask[..., None], logits, MASKED)
    return jnp.einsum("rlh,rlhd->rhd", jax.nn.softmax(logits, axis=1), values)

  def select(self, states: Float[Array, "rows length width"], which: str) -> Float[Array, "pairs width"]:
    """Returns the state of the "first" or of the "last" token of each pair."""
    if self.locations is not None:
      return self._on_each_device(functools.partial(_selected, which=which), states)
    if which == "first":
      return states[:, 0]
    if self.mask is None:
      return states[:, -1]
    return jnp.take_along_axis(states, last_true(self.mask)[:, None, None], axis=1)[:, 0]

  def _on_each_device(self, function: Callable[..., Array], *values: Array) -> Array:
    """Calls `function(segment_ids, locations, *values)` with one device's rows and pairs; locations count its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    segment_ids, locations = jnp.asarray(self.segment_ids, jnp.int32), jnp.asarray(self.locations, jnp.int32)
    if mesh.empty:
      return function(segment_ids, locations, *values)

    def local(segment_ids, locations, *values):
      first = jax.lax.axis_index(BATCH_AXES) * segment_ids.shape[0]
      return function(segment_ids, locations - jnp.array([1, 0]) * first, *values)

    rows = PartitionSpec(BATCH_AXES)
    split = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(segment_ids, locations, *values)


def last_true(mask: Bool[Array, "rows length"]) -> Int[Array, "rows"]:
  """Returns the position of the last True of each row, and 0 where there is none.

  Examples:
    >>> last_true(jnp.array([[True, True, False], [False, False, False]])).tolist()
    [1, 0]
  """
  return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)


def _owned(segment_ids: Array, locations: Array) -> Bool[Array, "pairs rows length"]:
  """Says for each pair which tokens are its own."""
  rows = jnp.arange(segment_ids.shape[0])
  return (locations[:, 0, None, None] == rows[:, None]) & (locations[:, 1, None, None] == segment_ids)


def _sums(segment_ids: Array, locations: Array, values: Array) -> Array:
  """Adds the values of each pair's tokens, as one matrix product, since a TPU is slow at scattering."""
  owned = _owned(segment_ids, locations).astype(values.dtype)
  return jnp.einsum("prl,rl...->p...", owned, values, precision=jax.lax.Precision.HIGHEST)


def _attended(segment_ids: Array, locations: Array, logits: Array, values: Array) -> Array:
  pairs = locations.shape[0]
  # Tokens of no pair, the padding, go to one more.
  owner = jnp.full((segment_ids.shape[0], segment_ids.shape[1] + 1), pairs, jnp.int32)
  owner = owner.at[locations[:, 0], locations[:, 1]].set(jnp.arange(pairs, dtype=jnp.int32)).at[:, 0].set(pairs)
  owner = jnp.take_along_axis(owner, segment_ids, axis=1)
  flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
  highest = jax.ops.segment_max(flat, owner.reshape(-1), pairs + 1)
  weights = jnp.exp(jnp.where(owner[..., None] < pairs, logits - highest[owner], MASKED))
  weighted = jnp.concatenate([weights[..., None] * values, weights[..., None]], axis=-1)
  total = _sums(segment_ids, locations, weighted)
  return total[..., :-1] / total[..., -1:]


def _selected(segment_ids: Array, locations: Array, states: Array, *, which: str) -> Array:
  mine = segment_ids[locations[:, 0]] == locations[:, 1, None]
  index = jnp.argmax(mine, axis=1) if which == "first" else last_true(mine)
  return states[locations[:, 0], index]


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

  @jax.named_scope("pool")
  def __call__(self, states: Float[Array, "rows length width"], tokens: Tokens) -> Float[Array, "pairs width"]:
    """Pools the tokens of each pair."""
    heads, head_dim = self.config.heads, self.config.head_dim
    query = self.q(self.probe[...]).reshape(heads, head_dim)
    keys, values = project(self.kv, states, heads, 2)
    logits = jnp.einsum("rlhd,hd->rlh", keys, query * head_dim**-0.5, preferred_element_type=jnp.float32)
    pooled = tokens.attend(logits, values)
    x = self.out(pooled.reshape(pooled.shape[0], -1))
    return x + self.mlp(self.norm(x))
