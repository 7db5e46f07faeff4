"""BERT-style text encoders of Hugging Face as text towers, such as sentence-transformers' MiniLM. Read only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from contrastive_jax.errors import UserError
from contrastive_jax.interop.keymap import Entry, entry, to_ours
from contrastive_jax.interop.torch_layers import layer_norm, linear, split_attention
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.models.config import DualEncoderConfig, TextConfig, TransformerConfig

FAMILY = "bert"
_POSITIONS = "embeddings.position_embeddings.weight"
_KINDS = "embeddings.token_type_embeddings.weight"
# Not read: the pooler is trained for next-sentence prediction, position numbers are no parameters.
_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
# Checkpoints of models with a head on top keep the encoder below this.
_PREFIX = "bert."
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read_config(config: Mapping[str, Any], *, source: str) -> DualEncoderConfig:
  """A dual encoder whose text tower is the encoder, with the mean of its tokens as embedding; the image tower is any.

  Raises:
    UserError: for an option that the text tower does not have.
  """
  if config.get("position_embedding_type", "absolute") != "absolute" or config.get("hidden_act") not in _ACTIVATIONS:
    raise UserError(
      f"{source} has position_embedding_type={config.get('position_embedding_type')!r} and"
      f" hidden_act={config.get('hidden_act')!r}: known are 'absolute' and {', '.join(_ACTIVATIONS)}"
    )
  width = config["hidden_size"]
  text = TextConfig(
    TransformerConfig(
      width,
      config["num_hidden_layers"],
      config["num_attention_heads"],
      config["intermediate_size"],
      norm_eps=config.get("layer_norm_eps", 1e-12),
      norm_position="post",
      activation=_ACTIVATIONS[config["hidden_act"]],
    ),
    vocab_size=config["vocab_size"],
    length=config["max_position_embeddings"],
    pool="mean",
    pre_norm=True,
    post_norm=False,
    projection=False,
  )
  return DualEncoderConfig(presets.resolve("clip_s16").vision, text, embed_dim=width)


def read_params(arrays: Mapping[str, np.ndarray], config: DualEncoderConfig, *, source: str) -> dict[str, Any]:
  """The parameters of the text tower alone.

  All tokens of a caption are of the first kind, so that the embedding of that kind is added to every position.

  Raises:
    UserError: naming the keys that are missing, unexpected or of another shape.
  """
  arrays = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if not name.startswith("cls.")}
  kinds = arrays.pop(_KINDS, None)
  if kinds is not None and _POSITIONS in arrays:
    arrays[_POSITIONS] = arrays[_POSITIONS] + kinds[0]
  _, abstract = dual_encoder.abstract(config)
  return to_ours(_entries(config.text), arrays, {"text": abstract["text"]}, source=source, ignored=_IGNORED)


def _entries(text: TextConfig) -> list[Entry]:
  blocks, layer, depth = "text/transformer/blocks", "encoder.layer.{layer}", text.transformer.depth
  projections = tuple(f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
  return [
    entry("text/tokens", "embeddings.word_embeddings.weight"),
    entry("text/position", _POSITIONS),
    *layer_norm("text/pre_norm", "embeddings.LayerNorm"),
    *split_attention(f"{blocks}/attention/qkv", projections, heads=text.transformer.heads, depth=depth),
    *linear(f"{blocks}/attention/out", f"{layer}.attention.output.dense", depth=depth),
    *layer_norm(f"{blocks}/norm1", f"{layer}.attention.output.LayerNorm", depth=depth),
    *linear(f"{blocks}/mlp/up", f"{layer}.intermediate.dense", depth=depth),
    *linear(f"{blocks}/mlp/down", f"{layer}.output.dense", depth=depth),
    *layer_norm(f"{blocks}/norm2", f"{layer}.output.LayerNorm", depth=depth),
  ]
