"""Hugging Face's CLIP, SigLIP and SigLIP 2, as `transformers` writes and reads them: configs and key maps."""

from collections.abc import Mapping
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop.keymap import SAME, TRANSPOSED, Entry, convolution, entry, extended
from contrastive_jax.interop.torch_layers import layer_norm, linear, pooling_attention, split_attention
from contrastive_jax.models.config import DualEncoderConfig, TextConfig, TransformerConfig, VisionConfig
from contrastive_jax.models.presets import CLIP_MEAN, CLIP_STD

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
# Pillow's numbers.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_RESAMPLING_NUMBERS = {ours: theirs for theirs, ours in _RESAMPLING.items()}

# What a field has that a config.json leaves out.
_SIGLIP_TOWER = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}
_SIGLIP_TEXT = {**_SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64}
_SIGLIP_VISION = {**_SIGLIP_TOWER, "num_channels": 3, "image_size": 224, "patch_size": 16, "num_patches": 256}
_DEFAULTS = {
  "clip": {
    "text_config": {
      **_SIGLIP_TEXT,
      "hidden_size": 512,
      "intermediate_size": 2048,
      "num_attention_heads": 8,
      "vocab_size": 49408,
      "max_position_embeddings": 77,
      "hidden_act": "quick_gelu",
      "layer_norm_eps": 1e-5,
    },
    "vision_config": {**_SIGLIP_VISION, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "projection_dim": 512,
  },
  "siglip": {"text_config": _SIGLIP_TEXT, "vision_config": _SIGLIP_VISION},
  "siglip2": {"text_config": _SIGLIP_TEXT, "vision_config": _SIGLIP_VISION},
}
# Stored position numbers, which are no parameters.
IGNORED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
FAMILIES = tuple(_DEFAULTS)


def read_config(config: Mapping[str, Any], preprocessing: Mapping[str, Any], *, source: str) -> DualEncoderConfig:
  """Our config from `config.json` and `preprocessor_config.json`.

  Args:
    config: of a model of one of `FAMILIES`.
    preprocessing: its image processor's; may be empty.
    source: where it comes from, for errors.

  Raises:
    UserError: for an option that this library does not have.
  """
  family = config["model_type"]
  defaults = _DEFAULTS[family]
  text, vision = (defaults[tower] | _given(config, tower) for tower in ("text_config", "vision_config"))
  if not vision.get("vision_use_head", True):
    raise UserError(f"{source} has no pooling head (vision_use_head=False): only whole dual encoders can be imported")
  for name in ("image_size", "patch_size"):
    if not isinstance(vision[name], int):
      raise UserError(f"{source} has {name}={vision[name]!r}: only squares are known, whose side is one number")
  clip = family == "clip"
  size = round(vision["num_patches"] ** 0.5) * vision["patch_size"] if family == "siglip2" else vision["image_size"]
  return DualEncoderConfig(
    vision=VisionConfig(
      _transformer(vision, source, init="clip" if clip else "xavier"),
      image_size=size,
      patch_size=vision["patch_size"],
      channels=vision["num_channels"],
      pool="cls" if clip else "map",
      class_token=clip,
      pre_norm=clip,
      patch_bias=not clip,
      projection=clip,
      **_seen(preprocessing, family, size, source),
    ),
    text=TextConfig(
      _transformer(text, source, init="clip" if clip else "xavier", causal=clip),
      vocab_size=text["vocab_size"],
      length=text["max_position_embeddings"],
      pool="eos" if clip else "last",
      attend_padding=not clip,
      projection=True,
      projection_bias=not clip,
    ),
    embed_dim=config.get("projection_dim", defaults.get("projection_dim")) if clip else vision["hidden_size"],
    init_logit_bias=None if clip else -10.0,
  )


def write_config(config: DualEncoderConfig, family: str) -> dict[str, Any]:
  """The `config.json` of a family, which may not be able to describe our config: it is read back and compared."""
  vision, text = config.vision, config.text
  written: dict[str, Any] = {
    "model_type": family,
    "architectures": [{"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[family]],
    "vision_config": _tower(vision.transformer) | {"num_channels": vision.channels, "patch_size": vision.patch_size},
    "text_config": _tower(text.transformer) | {"vocab_size": text.vocab_size, "max_position_embeddings": text.length},
  }
  size = {"num_patches": vision.grid**2} if family == "siglip2" else {"image_size": vision.image_size}
  written["vision_config"] |= size
  if family == "clip":
    written["projection_dim"] = config.embed_dim
    for tower in ("vision_config", "text_config"):
      written[tower]["projection_dim"] = config.embed_dim
  else:
    written["text_config"]["projection_size"] = config.embed_dim
  return written


def entries(config: DualEncoderConfig, family: str) -> list[Entry]:
  """The key map of a family."""
  vision, text, clip = config.vision, config.text, family == "clip"
  embeddings = "vision_model.embeddings"
  patches = TRANSPOSED if family == "siglip2" else convolution(vision.patch_size)
  table = [
    entry("image/patch_embedding/kernel", f"{embeddings}.patch_embedding.weight", patches),
    entry("image/position", f"{embeddings}.position_embedding.weight"),
    *_layers("image", "vision_model", vision.transformer),
    *layer_norm("image/post_norm", "vision_model.post_layernorm"),
    entry("text/tokens", "text_model.embeddings.token_embedding.weight"),
    entry("text/position", "text_model.embeddings.position_embedding.weight"),
    *_layers("text", "text_model", text.transformer),
    *layer_norm("text/post_norm", "text_model.final_layer_norm"),
    entry("log_logit_scale", "logit_scale", SAME if clip else extended(1)),
  ]
  if clip:
    return [
      *table,
      entry("image/class_token", f"{embeddings}.class_embedding"),
      *layer_norm("image/pre_norm", "vision_model.pre_layrnorm"),
      *linear("image/projection", "visual_projection", bias=False),
      *linear("text/projection", "text_projection", bias=False),
    ]
  head = "vision_model.head"
  return [
    *table,
    entry("logit_bias", "logit_bias", extended(1)),
    entry("image/patch_embedding/bias", f"{embeddings}.patch_embedding.bias"),
    entry("image/pool/probe", f"{head}.probe", extended(2)),
    *pooling_attention("image/pool", f"{head}.attention", heads=vision.transformer.heads),
    *layer_norm("image/pool/norm", f"{head}.layernorm"),
    *linear("image/pool/mlp/up", f"{head}.mlp.fc1"),
    *linear("image/pool/mlp/down", f"{head}.mlp.fc2"),
    *linear("text/projection", "text_model.head"),
  ]


def write_preprocessing(config: DualEncoderConfig, family: str, max_patches: int) -> dict[str, Any]:
  """The `preprocessor_config.json` of a family; `max_patches` is the length of a row of "siglip2"."""
  vision = config.vision
  shared = {
    "image_processor_type": {
      "clip": "CLIPImageProcessor",
      "siglip": "SiglipImageProcessor",
      "siglip2": "Siglip2ImageProcessor",
    }[family],
    "image_mean": list(vision.mean),
    "image_std": list(vision.std),
    "rescale_factor": 1 / 255,
    "resample": _RESAMPLING_NUMBERS[vision.interpolation],
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
  }
  if family == "siglip2":
    return {**shared, "patch_size": vision.patch_size, "max_num_patches": max_patches}
  square = {"height": vision.image_size, "width": vision.image_size}
  if family == "siglip":
    return {**shared, "size": square}
  crop = vision.resize == "crop"
  size = {"shortest_edge": vision.image_size} if crop else square
  return {**shared, "size": size, "do_center_crop": crop, "crop_size": square}


def _given(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
  # Configs of 2022 have a tower twice; `transformers` believes this one, with its defaults for what it leaves out.
  first = config.get(f"{tower}_dict")
  return dict((config.get(tower) or {}) if first is None else first)


def _transformer(tower: Mapping[str, Any], source: str, **options: Any) -> TransformerConfig:
  if tower["hidden_act"] not in _ACTIVATIONS:
    raise UserError(f"{source} has hidden_act='{tower['hidden_act']}', known are {', '.join(_ACTIVATIONS)}")
  return TransformerConfig(
    tower["hidden_size"],
    tower["num_hidden_layers"],
    tower["num_attention_heads"],
    tower["intermediate_size"],
    norm_eps=tower["layer_norm_eps"],
    activation=_ACTIVATIONS[tower["hidden_act"]],
    **options,
  )


def _tower(transformer: TransformerConfig) -> dict[str, Any]:
  return {
    "hidden_size": transformer.width,
    "num_hidden_layers": transformer.depth,
    "num_attention_heads": transformer.heads,
    "intermediate_size": transformer.mlp_dim,
    "layer_norm_eps": transformer.norm_eps,
    # Activations that the family lacks are found when the config is read back.
    "hidden_act": _ACTIVATION_NAMES.get(transformer.activation, "gelu"),
  }


def _layers(ours: str, theirs: str, transformer: TransformerConfig) -> list[Entry]:
  blocks, layer, depth = f"{ours}/transformer/blocks", f"{theirs}.encoder.layers.{{layer}}", transformer.depth
  projections = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
  return [
    *layer_norm(f"{blocks}/norm1", f"{layer}.layer_norm1", depth=depth),
    *split_attention(f"{blocks}/attention/qkv", projections, heads=transformer.heads, depth=depth),
    *linear(f"{blocks}/attention/out", f"{layer}.self_attn.out_proj", depth=depth),
    *layer_norm(f"{blocks}/norm2", f"{layer}.layer_norm2", depth=depth),
    *linear(f"{blocks}/mlp/up", f"{layer}.mlp.fc1", depth=depth),
    *linear(f"{blocks}/mlp/down", f"{layer}.mlp.fc2", depth=depth),
  ]


def _seen(preprocessing: Mapping[str, Any], family: str, side: int, source: str) -> dict[str, Any]:
  """How the image tower sees pictures, as fields of `VisionConfig`."""
  for step in ("do_resize", "do_rescale", "do_normalize"):
    if not preprocessing.get(step, True):
      raise UserError(
        f"{source} has {step}={preprocessing[step]}: only pictures that are resized, rescaled and normalised are known"
      )
  resample = preprocessing.get("resample", 2 if family == "siglip2" else 3)
  if resample not in _RESAMPLING:
    raise UserError(f"{source} has resample={resample}, known are 2 (bilinear) and 3 (bicubic)")
  mean, std = (CLIP_MEAN, CLIP_STD) if family == "clip" else ((0.5,) * 3, (0.5,) * 3)
  return {
    "mean": tuple(preprocessing.get("image_mean", mean)),
    "std": tuple(preprocessing.get("image_std", std)),
    "resize": "squash" if family == "siglip2" else _resize(preprocessing, family, side, source),
    "interpolation": _RESAMPLING[resample],
  }


def _resize(preprocessing: Mapping[str, Any], family: str, side: int, source: str) -> str:
  size, crop = preprocessing.get("size") or side, preprocessing.get("crop_size") or side
  cropped = family == "clip" and preprocessing.get("do_center_crop", True)
  square = {"height": side, "width": side}
  # In files of 2022 sizes are plain numbers: the shorter side in CLIP's, both sides in SigLIP's.
  if crop in (side, square) or not cropped:
    if size == square or (size == side and family != "clip"):
      return "squash"
    if cropped and size in (side, {"shortest_edge": side}):
      return "crop"
  raise UserError(
    f"{source} has size={size}, crop_size={crop} and do_center_crop={cropped}, which do not give the squares of"
    f" image_size={side} that its image tower reads: mend its preprocessor_config.json"
  )
