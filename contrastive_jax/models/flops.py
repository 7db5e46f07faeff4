"""Arithmetic of the towers, for model FLOPs utilisation."""

from contrastive_jax.models.config import DualEncoderConfig, TransformerConfig


def _mlp_flops(config: TransformerConfig, tokens: int) -> int:
  kernels = 3 if config.activation == "swiglu" else 2
  return 2 * tokens * kernels * config.width * config.mlp_dim


def block_flops(config: TransformerConfig, tokens: int, sequence: int) -> int:
  """Counts the FLOPs of the matrix products of one block.

  Args:
    config: the blocks.
    tokens: number of tokens.
    sequence: number of tokens that each attends to.
  """
  projections = 2 * tokens * 4 * config.width**2
  attention = 2 * 2 * tokens * sequence * config.width
  return projections + attention + _mlp_flops(config, tokens)


def _attention_pool_flops(config: TransformerConfig, tokens: int, pairs: int) -> int:
  keys_values = 2 * tokens * 2 * config.width**2
  attention = 2 * 2 * tokens * config.width
  return keys_values + attention + pairs * (2 * config.width**2 + _mlp_flops(config, 1))


def forward_flops_per_pair(
  config: DualEncoderConfig, *, images: int = 1, texts: int = 1, patches: int | None = None
) -> float:
  """Counts the FLOPs of the matrix products (2 m n k each) that embed one fixed-resolution image and one full caption,
  and what other towers read of the pair.

  Causal attention counts in full. Training costs three times as much. The query of attention pooling, one a batch, is
  left out. With tubelets it is still an image, whose patches have one frame.

  Args:
    config: the towers.
    images: number of views of the image that are embedded; what comes after the blocks is counted for the first.
    texts: number of captions of the pair that are embedded; the same holds for these.
    patches: number of patches of the image that are embedded; None is all of them.
  """
  image, text = config.image, config.text
  patches = image.grid**2 if patches is None else patches
  return forward_flops(
    config,
    pairs=1,
    patches=images * patches,
    image_sequence=patches,
    tokens=texts * text.length,
    text_sequence=text.length,
  )


def forward_flops(
  config: DualEncoderConfig,
  *,
  pairs: int,
  patches: int,
  image_sequence: int,
  tokens: int,
  text_sequence: int,
  frames: int = 1,
) -> float:
  """Counts the FLOPs of the matrix products that embed some pairs, packed or not, like `forward_flops_per_pair`.

  Args:
    config: the towers.
    pairs: number of images, or clips, and of captions.
    patches: number of patches of all images, or of tubelets of all clips.
    image_sequence: number of patches that each patch attends to, those of its own image.
    tokens: number of tokens of all captions.
    text_sequence: number of tokens that each token attends to.
    frames: number of frames of a patch.
  """
  image, text = config.image, config.text
  total = 2 * patches * frames * image.patch_dim * image.transformer.width
  first = pairs * image.class_token
  for tower, count, sequence in (
    (image, patches + first, image_sequence + image.class_token),
    (text, tokens, text_sequence),
  ):
    total += tower.transformer.depth * block_flops(tower.transformer, count, sequence)
    if tower.pool == "map":
      total += _attention_pool_flops(tower.transformer, count, pairs)
    if tower.projection:
      total += pairs * 2 * tower.transformer.width * config.embed_dim
  if text.tap:
    total += _attention_pool_flops(text.transformer, tokens, pairs)
    total += pairs * 2 * text.transformer.width * config.embed_dim
  return float(total + pairs * sum(other.forward_flops(config.embed_dim) for other in config.others))
