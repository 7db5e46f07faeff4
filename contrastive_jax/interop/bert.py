"""BERT-style text encoders of Hugging Face as text towers, such as sentence-transformers' MiniLM. Read only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contrastive_jax.errors import UserError
from contrastive_jax.interop import huggingface_options
from contrastive_jax.interop.keymap import Entry, entry, to_ours, unwrapped
from contrastive_jax.interop.options import check, check_choice
from contrastive_jax.interop.torch_layers import layer_norm, linear, split_attention
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.models.config import DualEncoderConfig, TextConfig, TransformerConfig

FAMILY = "bert"
# The table of positions of a caption.
POSITIONS = "embeddings.position_embeddings.weight"
_KINDS = "embeddings.token_type_embeddings.weight"
# Not read: the pooler is trained for next-sentence prediction, position numbers are no parameters.
_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
# Newer files name the mode in one option.
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
# Modules of sentence-transformers that are in the tower, in its pooling, or in how embeddings are compared.
_MODULES = ("Transformer", "Pooling", "Normalize")
# What a config.json leaves out.
_DEFAULTS = {
  "vocab_size": 30522,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "gelu",
  "max_position_embeddings": 512,
  "layer_norm_eps": 1e-12,
}
_ACTIVATIONS = {
  **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
  **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), "gelu_tanh"),
}


def read_pool(modules: Sequence[Mapping[str, Any]], pooling: Mapping[str, Any], *, source: str) -> str:
  """Reads how sentence-transformers makes one vector of a sentence, as `TextConfig.pool`.

  Args:
    modules: the content of `modules.json`; may be empty.
    pooling: the content of the pooling's `config.json`; may be empty, which takes the mean.
    source: where they come from, for errors.

  Raises:
    UserError: for a module or a pooling that the text tower does not have.
  """
  check(pooling, huggingface_options.POOLING, source=f"the pooling of {source}")
  names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
  modes = [name for name, used in pooling.items() if name.startswith("pooling_mode_") and used]
  if pooling.get("pooling_mode"):
    modes.append(_MODES.get(pooling["pooling_mode"], pooling["pooling_mode"]))
  if set(names) - set(_MODULES) or len(set(modes)) > 1 or set(modes) - set(_POOLING):
    raise UserError(
      f"{source} has the modules {', '.join(names)} and {', '.join(modes)}: known are {', '.join(_MODULES)} with one of"
      f" {', '.join(_POOLING)}"
    )
  if modes:
    return _POOLING[modes[0]]
  if pooling.get("pooling_mode_mean_tokens") is False or (modules and "Pooling" not in names):
    raise UserError(
      f"{source} does not pool its tokens into one vector: set pooling_mode_mean_tokens to true in its files"
    )
  return "mean"


def read_config(config: Mapping[str, Any], *, pool: str, source: str) -> DualEncoderConfig:
  """Makes a dual encoder whose text tower is the encoder; its image tower is arbitrary.

  Args:
    config: the content of `config.json`.
    pool: the pooling, as `read_pool` returns it.
    source: where the config comes from, for errors.

  Raises:
    UserError: for an option that the text tower does not have.
  """
  check(config, huggingface_options.BERT, source=source)
  config = _DEFAULTS | config
  check_choice("hidden_act", config["hidden_act"], _ACTIVATIONS, source=source)
  width = config["hidden_size"]
  text = TextConfig(
    TransformerConfig(
      width,
      config["num_hidden_layers"],
      config["num_attention_heads"],
      config["intermediate_size"],
      norm_eps=config["layer_norm_eps"],
      norm_position="post",
      activation=_ACTIVATIONS[config["hidden_act"]],
    ),
    vocab_size=config["vocab_size"],
    length=config["max_position_embeddings"],
    pool=pool,
    pre_norm=True,
    post_norm=False,
    projection=False,
  )
  return DualEncoderConfig(presets.resolve("clip_s16").image, text, embed_dim=width)


def bare(arrays: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
  """Returns the arrays of the encoder by their bare names, without those of heads on top of it.

  Args:
    arrays: the arrays of a checkpoint, by name.
    source: where they come from, for errors.
  """
  bodies = {name: array for name, array in arrays.items() if "cls." not in name}
  # Checkpoints that were converted from TensorFlow name the norms as it does.
  old = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
  for theirs, name in old:
    bodies = {found.replace(theirs, name): array for found, array in bodies.items()}
  return unwrapped(bodies, source=source)


def read_params(arrays: Mapping[str, np.ndarray], config: DualEncoderConfig, *, source: str) -> dict[str, Any]:
  """Makes the parameters of the text tower alone.

  All tokens of a caption are of the first kind, so that the embedding of that kind is added to every position.

  Raises:
    UserError: naming the keys that are missing, unexpected or of another shape.
  """
  arrays = dict(arrays)
  kinds = arrays.pop(_KINDS, None)
  if kinds is not None and POSITIONS in arrays:
    if kinds.ndim != 2 or kinds.shape[-1:] != arrays[POSITIONS].shape[-1:]:
      raise UserError(f"{source} has {_KINDS} of the shape {list(kinds.shape)}, which must be [kinds, width]")
    arrays[POSITIONS] = arrays[POSITIONS] + kinds[0]
  _, abstract = dual_encoder.abstract(config)
  return to_ours(entries(config.text), arrays, {"text": abstract["text"]}, source=source, ignored=_IGNORED)


def entries(text: TextConfig) -> list[Entry]:
  """Returns the key map of a text tower."""
  blocks, layer, depth = "text/transformer/blocks", "encoder.layer.{layer}", text.transformer.depth
  projections = tuple(f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
  return [
    entry("text/tokens", "embeddings.word_embeddings.weight"),
    entry("text/position", POSITIONS),
    *layer_norm("text/pre_norm", "embeddings.LayerNorm"),
    *split_attention(f"{blocks}/attention/qkv", projections, heads=text.transformer.heads, depth=depth),
    *linear(f"{blocks}/attention/out", f"{layer}.attention.output.dense", depth=depth),
    *layer_norm(f"{blocks}/norm1", f"{layer}.attention.output.LayerNorm", depth=depth),
    *linear(f"{blocks}/mlp/up", f"{layer}.intermediate.dense", depth=depth),
    *linear(f"{blocks}/mlp/down", f"{layer}.output.dense", depth=depth),
    *layer_norm(f"{blocks}/norm2", f"{layer}.output.LayerNorm", depth=depth),
  ]
