"""The text tower: embeds padded or packed captions as one vector each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from contrastive_jax.errors import UserError
from contrastive_jax.models import pooling
from contrastive_jax.models.config import TextConfig
from contrastive_jax.models.layers import Linear, ParameterMaker, l2_normalize, make_norm, make_projection, normal
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.models.positions import read
from contrastive_jax.models.transformer import Transformer


class Tap(nnx.Module):
  """Pools the states after a block in the middle of the tower: a norm, attention with a learned query, a projection.

  COSMO (arXiv 2401.00849) takes the embeddings of texts from there, so that the blocks above are free to generate.
  """

  def __init__(self, config: TextConfig, embed_dim: int, *, dtype: str, make: ParameterMaker):
    width = config.transformer.width
    self.norm = make_norm(config.transformer, make=make)
    self.pool = pooling.AttentionPool(config.transformer, dtype=dtype, make=make)
    init = normal(width**-0.5)
    self.projection = Linear(width, embed_dim, init=init, axes=("embed", None), use_bias=False, dtype=dtype, make=make)

  def __call__(self, states: Float[Array, "rows length width"], tokens: pooling.Tokens) -> TowerOutputs:
    """Pools the tokens of each pair."""
    pooled = self.pool(self.norm(states), tokens)
    return TowerOutputs(l2_normalize(self.projection(pooled)), pooled, states)


class TextTower(nnx.Module):
  """A transformer over tokens, causal or not."""

  def __init__(self, config: TextConfig, embed_dim: int, *, dtype: str, make: ParameterMaker):
    transformer = config.transformer
    width = transformer.width
    self.config = config
    self.dtype = dtype
    token_std, position_std = (0.02, 0.01) if transformer.init == "clip" else (width**-0.5, width**-0.5)
    self.tokens = make((config.vocab_size, width), normal(token_std), ("vocab", "embed"))
    learned = config.position == "learned"
    self.position = make((config.length, width), normal(position_std), (None, "embed")) if learned else None
    self.pre_norm = make_norm(transformer, make=make) if config.pre_norm else None
    self.transformer = Transformer(transformer, dtype=dtype, make=make)
    self.post_norm = make_norm(transformer, make=make) if config.post_norm else None
    self.pool = pooling.AttentionPool(transformer, dtype=dtype, make=make) if config.pool == "map" else None
    self.projection = make_projection(config, embed_dim, dtype=dtype, make=make)
    self.tap = Tap(config, embed_dim, dtype=dtype, make=make) if config.tap else None

  @jax.named_scope("text")
  def __call__(
    self,
    tokens: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"] | None = None,
    *,
    segment_ids: Any = None,
    locations: Any = None,
    keys: Key[Array, "rows"] | None = None,
  ) -> TowerOutputs:
    """Embeds captions.

    Args:
      tokens: the tokens of captions, one a row with padding at its end, or packed.
      mask: True on real tokens; None when packed.
      segment_ids: the segment of each token of packed rows, `[rows, length]`; 0 is padding, k the row's k-th caption.
      locations: the (row, segment) of each caption of packed rows, `[pairs, 2]`.
      keys: the random key of each row, for dropout and drop path; None is deterministic.

    Raises:
      UserError: if captions are packed for a tower that reads the padding.
    """
    pool = self.config.pool
    if locations is not None and (pool == "last" or self.config.attend_padding):
      raise UserError(
        f"captions cannot be packed for model.text.pool='{pool}' and model.text.attend_padding="
        f"{self.config.attend_padding}, which read the padding: set data.text_rows=0"
      )
    states, below = self._states(tokens, mask, segment_ids, keys)
    finished = self._finished(states)
    owned = pooling.Tokens(mask) if locations is None else pooling.Tokens(segment_ids=segment_ids, locations=locations)
    seen = pooling.Tokens() if self.config.attend_padding else owned
    if pool == "last":
      pooled = self._finished(states[:, -1])
    elif pool in ("eos", "cls"):
      # The norm treats tokens one by one: only the chosen one needs it.
      pooled = self._finished(owned.select(states, "last" if pool == "eos" else "first"))
    elif self.pool is None:
      pooled = owned.mean(finished)
    else:
      pooled = self.pool(finished, seen)
    embedding = l2_normalize(pooled if self.projection is None else self.projection(pooled))
    return TowerOutputs(embedding, pooled, finished, None if self.tap is None else self.tap(below, seen))

  def _finished(self, states: Float[Array, "... width"]) -> Float[Array, "... width"]:
    return states if self.post_norm is None else self.post_norm(states)

  def _states(
    self,
    tokens: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"] | None,
    segment_ids: Any,
    keys: Key[Array, "rows"] | None,
  ) -> tuple[Float[Array, "rows length width"], Float[Array, "rows length width"]]:
    """Returns the token states after the last block and before the last norm, and those at the tap."""
    length = tokens.shape[1]
    x = self.tokens[tokens]
    if self.position is not None:
      if segment_ids is None and length > self.config.length:
        most = self.config.length
        raise UserError(f"captions of {length} tokens exceed model.text.length={most}: tokenize to that length")
      x = x + (self.position[:length] if segment_ids is None else read(self.position[...], _restarting(segment_ids)))
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    # Padding comes last, so that a causal tower never sees it from a real token.
    ignored = segment_ids is None and not (self.config.attend_padding or self.config.transformer.causal)
    mask = mask[:, None, :] if ignored else None
    run = functools.partial(self.transformer, mask=mask, segment_ids=segment_ids, keys=keys)
    x = x.astype(self.dtype)
    if self.tap is None:
      return run(x), x
    below = run(x, last=self.config.tap)
    return run(below, first=self.config.tap), below


def _restarting(segment_ids: Any) -> Int[Array, "rows length"]:
  """Counts the position of each token in its own caption."""
  segment_ids = jnp.asarray(segment_ids)
  place = jnp.arange(segment_ids.shape[1])
  begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
