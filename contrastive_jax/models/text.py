"""The text tower: padded captions into one vector each."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from contrastive_jax.errors import UserError
from contrastive_jax.models import pooling
from contrastive_jax.models.layers import Norm, ParameterMaker, make_projection, normal
from contrastive_jax.models.presets import TextConfig
from contrastive_jax.models.transformer import Transformer


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
    self.transformer = Transformer(transformer, dtype=dtype, make=make)
    self.post_norm = Norm(width, kind=transformer.norm, eps=transformer.norm_eps, make=make)
    self.pool = pooling.AttentionPool(transformer, dtype=dtype, make=make) if config.pool == "map" else None
    self.projection = make_projection(config, embed_dim, dtype=dtype, make=make)

  def __call__(
    self,
    tokens: Int[Array, "pairs length"],
    mask: Bool[Array, "pairs length"],
    *,
    keys: Key[Array, "pairs"] | None = None,
  ) -> Float[Array, "pairs dim"]:
    """Embeds captions, not normalised.

    Args:
      tokens: padded at the end.
      mask: True on real tokens.
      keys: of dropout and drop path, one a caption; None is deterministic.
    """
    states = self.states(tokens, mask, keys=keys)
    pool = self.config.pool
    if pool in ("eos", "last", "cls"):
      # The norm treats tokens one by one: only the chosen one needs it.
      pooled = self.post_norm(pooling.select(states, self._chosen(mask)))
    else:
      states = self.post_norm(states)
      seen = None if self.config.attend_padding else mask
      pooled = pooling.mean(states, mask) if self.pool is None else self.pool(states, mask=seen)
    return pooled if self.projection is None else self.projection(pooled)

  def _chosen(self, mask: Bool[Array, "pairs length"]) -> Int[Array, "pairs"]:
    if self.config.pool == "eos":
      return pooling.last_true(mask)
    return jnp.full(mask.shape[0], 0 if self.config.pool == "cls" else mask.shape[1] - 1)

  def states(
    self,
    tokens: Int[Array, "pairs length"],
    mask: Bool[Array, "pairs length"],
    *,
    keys: Key[Array, "pairs"] | None = None,
  ) -> Float[Array, "pairs length width"]:
    """Token states after the last block, before the last norm."""
    length = tokens.shape[1]
    if self.position is not None and length > self.config.length:
      raise UserError(f"captions of {length} tokens exceed text.length={self.config.length}: tokenize to that length")
    x = self.tokens[tokens]
    if self.position is not None:
      x = x + self.position[:length]
    # Padding comes last, so that a causal tower never sees it from a real token.
    ignore_padding = not (self.config.attend_padding or self.config.transformer.causal)
    return self.transformer(x.astype(self.dtype), mask=mask[:, None, :] if ignore_padding else None, keys=keys)
