"""Arithmetic of the towers, for model FLOPs utilisation."""

from contrastive_jax.models.presets import DualEncoderConfig, TransformerConfig


def _mlp_flops(config: TransformerConfig, tokens: int) -> int:
  kernels = 3 if config.activation == "swiglu" else 2
  return 2 * tokens * kernels * config.width * config.mlp_dim


def _block_flops(config: TransformerConfig, tokens: int) -> int:
  projections = 2 * tokens * 4 * config.width**2
  attention = 2 * 2 * tokens**2 * config.width
  return projections + attention + _mlp_flops(config, tokens)


def _attention_pool_flops(config: TransformerConfig, tokens: int) -> int:
  keys_values = 2 * tokens * 2 * config.width**2
  attention = 2 * 2 * tokens * config.width
  return keys_values + attention + 2 * config.width**2 + _mlp_flops(config, 1)


def forward_flops_per_pair(config: DualEncoderConfig) -> float:
  """FLOPs of the matrix products (2 m n k each) that embed one fixed-resolution image and one full-length caption.

  Causal attention counts in full. Training costs three times as much. The query of attention pooling, one a batch, is
  left out.
  """
  vision, text = config.vision, config.text
  patches = vision.grid**2
  total = 2 * patches * vision.patch_dim * vision.transformer.width
  for tower, tokens in ((vision, patches + vision.class_token), (text, text.length)):
    total += tower.transformer.depth * _block_flops(tower.transformer, tokens)
    if tower.pool == "map":
      total += _attention_pool_flops(tower.transformer, tokens)
    if tower.projection:
      total += 2 * tower.transformer.width * config.embed_dim
  return float(total)
