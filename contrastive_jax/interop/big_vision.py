"""big_vision's two towers from its `.npz` files (SigLIP, LiT): the config is read off the shapes, then a key map."""

import re
from collections.abc import Mapping

import numpy as np

from contrastive_jax.errors import UserError
from contrastive_jax.interop.keymap import Entry, Form, by_heads, entry, extended, one
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, TextConfig, TransformerConfig

# Files hold the parameters alone, or below this beside the optimizer's.
_ROOT = "params/"
_ATTENTION, _MLP, _POOL = "MultiHeadDotProductAttention_0", "MlpBlock_0", "MAPHead_0"
_LAYER = re.compile(r"encoderblock_(\d+)/")


def parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the parameters among the arrays of a file, without the prefix that their names share."""
  if any(name.startswith(_ROOT) for name in arrays):
    return {name.removeprefix(_ROOT): array for name, array in arrays.items() if name.startswith(_ROOT)}
  return dict(arrays)


def read_config(arrays: Mapping[str, np.ndarray], *, source: str) -> DualEncoderConfig:
  """Makes our config from the shapes of `parameters`.

  Raises:
    UserError: if they are not those of two towers that this library has.
  """
  for name in ("img/embedding/kernel", "img/pos_embedding", "txt/Embed_0/embedding", "txt/pos_embedding", "t"):
    if name not in arrays:
      raise UserError(f"{source} has no {name}: only two-tower models of transformers are read, such as SigLIP and LiT")
  patch_size, across, channels, _ = _shape(arrays, "img/embedding/kernel", 4, source)
  _, positions, _ = _shape(arrays, "img/pos_embedding", 3, source)
  vocab_size, text_width = _shape(arrays, "txt/Embed_0/embedding", 2, source)
  _, length, _ = _shape(arrays, "txt/pos_embedding", 3, source)
  grid = round(positions**0.5)
  if patch_size != across or grid**2 != positions:
    raise UserError(
      f"{source} has patches of {patch_size} x {across} pixels and {positions} of them: only squares are read"
    )
  image_head, text_head = ("img/head/kernel" in arrays), ("txt/head/kernel" in arrays)
  if "img/cls" in arrays:
    raise UserError(f"{source} has a class token without a position, which this library's image tower does not have")
  text_pool = "map" if f"txt/{_POOL}/probe" in arrays else "last"
  return DualEncoderConfig(
    image=ImageConfig(
      _transformer(arrays, "img/Transformer", source),
      image_size=grid * patch_size,
      patch_size=patch_size,
      channels=channels,
      pool="map" if f"img/{_POOL}/probe" in arrays else "mean",
      patch_bias=True,
      projection=image_head,
      projection_bias=image_head,
      resize="squash",
      interpolation="bilinear",
    ),
    text=TextConfig(
      _transformer(arrays, "txt/Encoder_0", source),
      vocab_size=vocab_size,
      length=length,
      pool=text_pool,
      attend_padding=True,
      projection=text_head,
      projection_bias=text_head,
    ),
    embed_dim=_shape(arrays, "txt/head/kernel", 2, source)[1] if text_head else text_width,
    init_logit_bias=-10.0 if "b" in arrays else None,
  )


def entries(config: DualEncoderConfig) -> list[Entry]:
  """Returns the key map of two towers."""
  image, text = config.image, config.text
  table = [
    entry("image/patch_embedding/kernel", "img/embedding/kernel", _patches(image)),
    entry("image/patch_embedding/bias", "img/embedding/bias"),
    entry("image/position", "img/pos_embedding", extended(1)),
    *_encoder("image", "img/Transformer", image.transformer),
    entry("text/tokens", "txt/Embed_0/embedding"),
    entry("text/position", "txt/pos_embedding", extended(1)),
    *_encoder("text", "txt/Encoder_0", text.transformer),
    entry("log_logit_scale", "t", extended(1)),
  ]
  for ours, theirs, tower in (("image", "img", image), ("text", "txt", text)):
    if tower.pool == "map":
      table += _attention_pool(f"{ours}/pool", f"{theirs}/{_POOL}", tower.transformer)
    if tower.projection:
      table += [entry(f"{ours}/projection/{leaf}", f"{theirs}/head/{leaf}") for leaf in ("kernel", "bias")]
  if config.init_logit_bias is not None:
    table.append(entry("logit_bias", "b", extended(1)))
  return table


def _shape(arrays: Mapping[str, np.ndarray], name: str, axes: int, source: str) -> tuple[int, ...]:
  """Returns the shape of an array that must have so many axes, none of them empty."""
  if name not in arrays:
    raise UserError(f"{source} has no {name}: only plain transformers are read, saved layer by layer (scan=False)")
  shape = arrays[name].shape
  if len(shape) != axes or 0 in shape:
    raise UserError(f"{source} has {name} of the shape {list(shape)}, which must have {axes} axes: copy it again")
  return shape


def _transformer(arrays: Mapping[str, np.ndarray], encoder: str, source: str) -> TransformerConfig:
  layers = {int(match[1]) for name in arrays if name.startswith(encoder) and (match := _LAYER.search(name))}
  block = f"{encoder}/encoderblock_0"
  width, heads, _ = _shape(arrays, f"{block}/{_ATTENTION}/query/kernel", 3, source)
  _, mlp_dim = _shape(arrays, f"{block}/{_MLP}/Dense_0/kernel", 2, source)
  return TransformerConfig(width, 1 + max(layers), heads, mlp_dim, activation="gelu_tanh")


def _patches(image: ImageConfig) -> Form:
  shape = (image.patch_size, image.patch_size, image.channels, -1)
  return one(lambda kernel: kernel.reshape(-1, kernel.shape[-1]), lambda kernel: kernel.reshape(shape))


def _heads(heads: int) -> Form:
  """Returns a form whose side in their file is `[..., heads, head_dim]`, and ours has all heads in one axis."""
  return one(
    lambda array: array.reshape(*array.shape[:-2], -1), lambda array: array.reshape(*array.shape[:-1], heads, -1)
  )


def _out_of(heads: int) -> Form:
  """Returns a form whose side in their file is `[heads, head_dim, width]`, and ours is a matrix."""
  return one(lambda array: array.reshape(-1, array.shape[-1]), lambda array: array.reshape(heads, -1, array.shape[-1]))


def _norm(ours: str, theirs: str, depth: int = 0) -> list[Entry]:
  return [entry(f"{ours}/{leaf}", f"{theirs}/{leaf}", depth=depth) for leaf in ("scale", "bias")]


def _mlp(ours: str, theirs: str, depth: int = 0) -> list[Entry]:
  return [
    entry(f"{ours}/{name}/{leaf}", f"{theirs}/{dense}/{leaf}", depth=depth)
    for name, dense in (("up", "Dense_0"), ("down", "Dense_1"))
    for leaf in ("kernel", "bias")
  ]


def _projections(ours: str, theirs: str, names: tuple[str, ...], heads: int, depth: int = 0) -> list[Entry]:
  form = by_heads(heads, _heads(heads), len(names))
  return [
    Entry((f"{ours}/{leaf}",), tuple(f"{theirs}/{name}/{leaf}" for name in names), form, depth)
    for leaf in ("kernel", "bias")
  ]


def _out(ours: str, theirs: str, heads: int, depth: int = 0) -> list[Entry]:
  return [
    entry(f"{ours}/kernel", f"{theirs}/kernel", _out_of(heads), depth),
    entry(f"{ours}/bias", f"{theirs}/bias", depth=depth),
  ]


def _encoder(tower: str, theirs: str, transformer: TransformerConfig) -> list[Entry]:
  ours, block = f"{tower}/transformer/blocks", f"{theirs}/encoderblock_{{layer}}"
  heads, depth, attention = transformer.heads, transformer.depth, f"{block}/{_ATTENTION}"
  return [
    *_norm(f"{ours}/norm1", f"{block}/LayerNorm_0", depth),
    *_projections(f"{ours}/attention/qkv", attention, ("query", "key", "value"), heads, depth),
    *_out(f"{ours}/attention/out", f"{attention}/out", heads, depth),
    *_norm(f"{ours}/norm2", f"{block}/LayerNorm_1", depth),
    *_mlp(f"{ours}/mlp", f"{block}/{_MLP}", depth),
    *_norm(f"{tower}/post_norm", f"{theirs}/encoder_norm"),
  ]


def _attention_pool(ours: str, theirs: str, transformer: TransformerConfig) -> list[Entry]:
  heads, attention = transformer.heads, f"{theirs}/{_ATTENTION}"
  return [
    entry(f"{ours}/probe", f"{theirs}/probe", extended(2)),
    *_projections(f"{ours}/q", attention, ("query",), heads),
    *_projections(f"{ours}/kv", attention, ("key", "value"), heads),
    *_out(f"{ours}/out", f"{attention}/out", heads),
    *_norm(f"{ours}/norm", f"{theirs}/LayerNorm_0"),
    *_mlp(f"{ours}/mlp", f"{theirs}/{_MLP}"),
  ]
