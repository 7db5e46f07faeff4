"""open_clip's CLIP and SigLIP towers, by its JSON configs and its own names: configs and key maps.

SigLIP's image tower is timm's, which is built by name: only the sizes that have one can be written.
"""

import re
from collections.abc import Mapping
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop import open_clip_options as options
from contrastive_jax.interop.keymap import SAME, TRANSPOSED, Entry, by_heads, convolution, entry, extended, in_rows
from contrastive_jax.interop.options import COUNT, check, check_choice
from contrastive_jax.interop.torch_layers import fused_attention, layer_norm, linear
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.models.presets import CLIP_MEAN, CLIP_STD, SIZES

_TIMM = re.compile(r"vit_(\w+)_patch(\d+)_siglip_(\d+)(?:\.\w+)?")
_TIMM_SIZES = {"base": "B", "large": "L", "so400m": "So400m"}
# The image sizes that timm has a tower of: the size is part of the name.
_TIMM_IMAGES = {
  "base_patch16": (224, 256, 384, 512),
  "base_patch32": (256,),
  "large_patch16": (256, 384, 512),
  "so400m_patch14": (224, 378, 384),
  "so400m_patch16": (256, 384, 512),
}
# Image towers that timm gives the approximate activation that SigLIP was trained with; to the others it gives GELU.
_TIMM_TANH = ("so400m_patch16",)
# "random" is bicubic but in training.
_INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
_RESIZING = {"shortest": "crop", "squash": "squash"}

IGNORED = ("attn_mask", "text.attn_mask")


def read_config(config: Mapping[str, Any], preprocessing: Mapping[str, Any], *, source: str) -> DualEncoderConfig:
  """Makes our config from a model config and a preprocessing config of open_clip.

  Args:
    config: the config that open_clip calls `model_cfg`.
    preprocessing: the config that it calls `preprocess_cfg`; may be empty.
    source: where they come from, for errors.

  Raises:
    UserError: for towers that this library does not have.
  """
  missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in config]
  if missing:
    raise UserError(f"{source} comes with a config without {', '.join(missing)}: give that of an open_clip model")
  check(config, options.MODEL, source=source)
  vision, text = config["vision_cfg"], config["text_cfg"]
  check(vision, options.TIMM if vision.get("timm_model_name") else options.VISION, source=source, within="vision_cfg")
  check(text, options.TEXT_TOWER, source=source, within="text_cfg")
  check(preprocessing, options.PREPROCESSING, source=source, within="preprocess_cfg")
  size = _side(vision.get("image_size", 224), "vision_cfg.image_size", source)
  if preprocessing.get("size") is not None and _side(preprocessing["size"], "preprocess_cfg.size", source) != size:
    raise UserError(
      f"{source} has preprocess_cfg.size={preprocessing['size']} and vision_cfg.image_size={size}: they must be equal"
    )
  quick = bool(config.get("quick_gelu", False))
  timm, bias = vision.get("timm_model_name"), config.get("init_logit_bias")
  return DualEncoderConfig(
    image=(
      _timm(vision, size, preprocessing, source) if timm else _clip_vision(vision, size, preprocessing, quick, source)
    ),
    text=_text(text, quick, source),
    embed_dim=config["embed_dim"],
    init_logit_bias=None if bias is None else float(bias),
  )


def write_config(config: DualEncoderConfig) -> dict[str, Any]:
  """Writes a model config of open_clip, which may not be able to describe ours: it is read back and compared."""
  image, text = config.image, config.text
  quick = image.transformer.activation == "quick_gelu"
  if image.pool == "map":
    tower: dict[str, Any] = {"timm_model_name": _timm_name(image), "timm_pool": "map", "timm_proj": "none"}
    tower |= {"timm_model_pretrained": False, "image_size": image.image_size}
  else:
    tower = _sizes(image.transformer) | {"patch_size": image.patch_size, "image_size": image.image_size}
    tower["head_width"] = image.transformer.head_dim
    tower |= _kwargs(image.transformer)
  written = {
    "embed_dim": config.embed_dim,
    "vision_cfg": tower,
    "text_cfg": {
      **_sizes(text.transformer),
      **_kwargs(text.transformer),
      "heads": text.transformer.heads,
      "context_length": text.length,
      "vocab_size": text.vocab_size,
    },
  }
  if quick:
    written["quick_gelu"] = True
  if config.init_logit_bias is not None:
    written["init_logit_bias"] = config.init_logit_bias
  if image.pool == "map":
    written["custom_text"] = True
    written["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
  return written


def write_preprocessing(config: DualEncoderConfig) -> dict[str, Any]:
  """Writes a preprocessing config of open_clip."""
  image = config.image
  return {
    "size": image.image_size,
    "mean": list(image.mean),
    "std": list(image.std),
    "interpolation": image.interpolation,
    "resize_mode": "shortest" if image.resize == "crop" else "squash",
  }


def entries(config: DualEncoderConfig, *, custom_text: bool) -> list[Entry]:
  """Returns the key map; `custom_text` puts the text tower's names below "text."."""
  image, text = config.image, config.text
  prefix = "text." if custom_text else ""
  table = _timm_entries(image) if image.pool == "map" else _clip_entries(image)
  table += [
    entry("text/tokens", f"{prefix}token_embedding.weight"),
    entry("text/position", f"{prefix}positional_embedding"),
    *_blocks("text", f"{prefix}transformer.resblocks", text.transformer),
    *layer_norm("text/post_norm", f"{prefix}ln_final"),
    entry("log_logit_scale", "logit_scale"),
  ]
  table += (
    linear("text/projection", f"{prefix}text_projection")
    if text.projection_bias
    else [entry("text/projection/kernel", f"{prefix}text_projection")]
  )
  return table + [entry("logit_bias", "logit_bias")] * (config.init_logit_bias is not None)


def _clip_entries(image: ImageConfig) -> list[Entry]:
  return [
    entry("image/class_token", "visual.class_embedding"),
    entry("image/patch_embedding/kernel", "visual.conv1.weight", convolution(image.patch_size)),
    entry("image/position", "visual.positional_embedding"),
    *layer_norm("image/pre_norm", "visual.ln_pre"),
    *_blocks("image", "visual.transformer.resblocks", image.transformer),
    *layer_norm("image/post_norm", "visual.ln_post"),
    entry("image/projection/kernel", "visual.proj"),
  ]


def _timm_entries(image: ImageConfig) -> list[Entry]:
  trunk, heads, depth = "visual.trunk", image.transformer.heads, image.transformer.depth
  blocks, layer, pool = "image/transformer/blocks", f"{trunk}.blocks.{{layer}}", f"{trunk}.attn_pool"
  pooled = [
    Entry((f"image/pool/kv/{leaf}",), (f"{pool}.kv.{name}",), in_rows(by_heads(heads, form, parts=2), parts=2))
    for leaf, name, form in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
  ]
  return [
    entry("image/patch_embedding/kernel", f"{trunk}.patch_embed.proj.weight", convolution(image.patch_size)),
    entry("image/patch_embedding/bias", f"{trunk}.patch_embed.proj.bias"),
    entry("image/position", f"{trunk}.pos_embed", extended(1)),
    *layer_norm(f"{blocks}/norm1", f"{layer}.norm1", depth=depth),
    *fused_attention(
      f"{blocks}/attention/qkv", (f"{layer}.attn.qkv.weight", f"{layer}.attn.qkv.bias"), heads=heads, depth=depth
    ),
    *linear(f"{blocks}/attention/out", f"{layer}.attn.proj", depth=depth),
    *layer_norm(f"{blocks}/norm2", f"{layer}.norm2", depth=depth),
    *linear(f"{blocks}/mlp/up", f"{layer}.mlp.fc1", depth=depth),
    *linear(f"{blocks}/mlp/down", f"{layer}.mlp.fc2", depth=depth),
    *layer_norm("image/post_norm", f"{trunk}.norm"),
    entry("image/pool/probe", f"{pool}.latent", extended(2)),
    *linear("image/pool/q", f"{pool}.q"),
    *pooled,
    *linear("image/pool/out", f"{pool}.proj"),
    *layer_norm("image/pool/norm", f"{pool}.norm"),
    *linear("image/pool/mlp/up", f"{pool}.mlp.fc1"),
    *linear("image/pool/mlp/down", f"{pool}.mlp.fc2"),
  ]


def _blocks(ours: str, theirs: str, transformer: TransformerConfig) -> list[Entry]:
  blocks, layer, depth = f"{ours}/transformer/blocks", f"{theirs}.{{layer}}", transformer.depth
  fused = (f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias")
  return [
    *layer_norm(f"{blocks}/norm1", f"{layer}.ln_1", depth=depth),
    *fused_attention(f"{blocks}/attention/qkv", fused, heads=transformer.heads, depth=depth),
    *linear(f"{blocks}/attention/out", f"{layer}.attn.out_proj", depth=depth),
    *layer_norm(f"{blocks}/norm2", f"{layer}.ln_2", depth=depth),
    *linear(f"{blocks}/mlp/up", f"{layer}.mlp.c_fc", depth=depth),
    *linear(f"{blocks}/mlp/down", f"{layer}.mlp.c_proj", depth=depth),
  ]


def _clip_vision(
  vision: Mapping[str, Any], size: int, preprocessing: Mapping[str, Any], quick: bool, source: str
) -> ImageConfig:
  if isinstance(vision.get("layers"), list):
    raise UserError(f"{source} has a ResNet for images, which this library does not have")
  if not COUNT.holds(vision.get("layers", 12)):
    raise UserError(f"{source} has vision_cfg.layers={vision['layers']!r}, which must be {COUNT.words}")
  width = vision.get("width", 768)
  return ImageConfig(
    _transformer(vision, width // vision.get("head_width", 64), width, quick, source),
    image_size=size,
    patch_size=vision.get("patch_size", 16),
    pool="cls",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    projection=True,
    **_seen(preprocessing, CLIP_MEAN, CLIP_STD, "shortest", source),
  )


def _timm(vision: Mapping[str, Any], size: int, preprocessing: Mapping[str, Any], source: str) -> ImageConfig:
  name = vision["timm_model_name"]
  match = _TIMM.fullmatch(name)
  for option, default in (("timm_pool", "avg"), ("timm_proj", "linear")):
    # What the config leaves out has a default that does not fit.
    check({option: vision.get(option, default)}, options.TIMM, source=source, within="vision_cfg")
  if not match or match[1] not in _TIMM_SIZES:
    known = ", ".join(f"vit_{size}_patch16_siglip_224" for size in _TIMM_SIZES)
    raise UserError(f"{source} has the image tower '{name}', known are those such as {known}")
  activation = "gelu_tanh" if f"{match[1]}_patch{match[2]}" in _TIMM_TANH else "gelu"
  return ImageConfig(
    TransformerConfig(*SIZES[_TIMM_SIZES[match[1]]], activation=activation),
    image_size=size,
    patch_size=int(match[2]),
    **_seen(preprocessing, (0.5,) * 3, (0.5,) * 3, "squash", source),
  )


def _timm_name(image: ImageConfig) -> str:
  transformer = image.transformer
  shape = (transformer.width, transformer.depth, transformer.heads, transformer.mlp_dim)
  for name, size in _TIMM_SIZES.items():
    tower = f"{name}_patch{image.patch_size}"
    if tuple(SIZES[size]) == shape and image.image_size in _TIMM_IMAGES.get(tower, ()):
      return f"vit_{tower}_siglip_{image.image_size}"
  raise UserError(
    f"open_clip takes SigLIP's image tower from timm, which has none of width {shape[0]}, depth {shape[1]},"
    f" {shape[2]} heads, patches of {image.patch_size} and images of {image.image_size} pixels: export to huggingface"
  )


def _text(text: Mapping[str, Any], quick: bool, source: str) -> TextConfig:
  width, pool = text.get("width", 512), text.get("pool_type", "argmax")
  pools = {"argmax": "eos", "eos": "eos", "last": "last"}
  check_choice("text_cfg.pool_type", pool, pools, source=source)
  if pool == "argmax" and text.get("hf_tokenizer_name"):
    raise UserError(
      f"{source} pools captions at their largest token (pool_type='argmax'), which ends them in CLIP's tokenizer, and"
      f" has hf_tokenizer_name='{text['hf_tokenizer_name']}': only 'eos' and 'last' are known beside it"
    )
  causal = not text.get("no_causal_mask", False)
  return TextConfig(
    _transformer(text, text.get("heads", 8), width, quick, source, causal=causal),
    vocab_size=text.get("vocab_size", 49408),
    length=text.get("context_length", 77),
    pool=pools[pool],
    attend_padding=not causal,
    projection=True,
    projection_bias=text.get("proj_bias", False),
  )


def _side(size: int | list[int], name: str, source: str) -> int:
  sides = size if isinstance(size, list) else [size]
  if len(set(sides)) > 1:
    raise UserError(f"{source} has {name}={size}: only squares are known, whose side is one number")
  return sides[0]


def _transformer(
  tower: Mapping[str, Any], heads: int, width: int, quick: bool, source: str, causal: bool = False
) -> TransformerConfig:
  activation = "quick_gelu" if quick else "gelu"
  arguments = tower.get("act_kwargs") or {}
  check(arguments, options.ACTIVATION, source=source, within="act_kwargs")
  check(tower.get("norm_kwargs") or {}, options.NORM, source=source, within="norm_kwargs")
  if arguments and quick:
    raise UserError(f"{source} has act_kwargs={arguments} and quick_gelu=True, an activation without options")
  if arguments.get("approximate") == "tanh":
    activation = "gelu_tanh"
  return TransformerConfig(
    width,
    tower.get("layers", 12),
    heads,
    int(width * tower.get("mlp_ratio", 4.0)),
    norm_eps=(tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    activation=activation,
    causal=causal,
    init="clip",
  )


def _sizes(transformer: TransformerConfig) -> dict[str, Any]:
  # A hair more than the quotient, which is rounded down when it is multiplied again.
  ratio = transformer.mlp_dim / transformer.width
  exact = int(transformer.width * ratio) == transformer.mlp_dim
  return {
    "width": transformer.width,
    "layers": transformer.depth,
    "mlp_ratio": ratio if exact else (transformer.mlp_dim + 0.5) / transformer.width,
  }


def _kwargs(transformer: TransformerConfig) -> dict[str, Any]:
  kwargs: dict[str, Any] = {}
  if transformer.norm_eps != 1e-5:
    kwargs["norm_kwargs"] = {"eps": transformer.norm_eps}
  if transformer.activation == "gelu_tanh":
    kwargs["act_kwargs"] = {"approximate": "tanh"}
  return kwargs


def _seen(
  preprocessing: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], resize_mode: str, source: str
) -> dict[str, Any]:
  given = {name: value for name, value in preprocessing.items() if value is not None}
  if given:
    # open_clip's own defaults for what the file leaves out; a file without any says nothing.
    mean, std, resize_mode = CLIP_MEAN, CLIP_STD, "shortest"
  resize_mode, interpolation = given.get("resize_mode", resize_mode), given.get("interpolation", "bicubic")
  check_choice("preprocess_cfg.resize_mode", resize_mode, _RESIZING, source=source)
  check_choice("preprocess_cfg.interpolation", interpolation, _INTERPOLATIONS, source=source)
  mean, std = (_channels(given.get(name, own), name, source) for name, own in (("mean", mean), ("std", std)))
  if min(std) <= 0:
    raise UserError(f"{source} has preprocess_cfg.std={list(std)}, which must be above 0")
  return {
    "mean": mean,
    "std": std,
    "resize": _RESIZING[resize_mode],
    "interpolation": _INTERPOLATIONS[interpolation],
  }


def _channels(value: Any, name: str, source: str) -> tuple[float, ...]:
  channels = tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
  if len(channels) != 3:
    raise UserError(f"{source} has preprocess_cfg.{name}={list(value)}, which must have 3 values, one a channel")
  return channels
