"""Hugging Face's CLIP, SigLIP and SigLIP 2, as `transformers` writes and reads them: configs and key maps."""

from collections.abc import Mapping
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop import huggingface_options
from contrastive_jax.interop.keymap import SAME, TRANSPOSED, Entry, convolution, entry, extended
from contrastive_jax.interop.options import check, check_choice
from contrastive_jax.interop.torch_layers import layer_norm, linear, pooling_attention, split_attention
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.models.presets import CLIP_MEAN, CLIP_STD

_ACTIVATIONS = {
  "quick_gelu": "quick_gelu",
  **dict.fromkeys(("gelu_python", "gelu"), "gelu"),
  **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), "gelu_tanh"),
}
# The last name of each is the one that is written.
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
# Pillow's numbers.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_RESAMPLING_NUMBERS = {ours: theirs for theirs, ours in _RESAMPLING.items()}

# The side in pixels of an image processor that does not say.
_DEFAULT_SIDE = 224
# The largest number that a pixel may become, and the largest by which it may be scaled: towers that read others give
# numbers that are not finite.
_LARGEST_PIXEL = 1e6
# The patches of a SigLIP 2 picture that its image processor does not say.
DEFAULT_PATCHES = 256

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
# The end of captions of a CLIP config that does not name it.
_CLIP_END = 49407
# Stored position numbers, which are no parameters.
IGNORED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
# The table of positions of a caption.
TEXT_POSITIONS = "text_model.embeddings.position_embedding.weight"
FAMILIES = tuple(_DEFAULTS)


def read_config(config: Mapping[str, Any], preprocessing: Mapping[str, Any], *, source: str) -> DualEncoderConfig:
  """Makes our config from `config.json` and `preprocessor_config.json`.

  Args:
    config: the config of a model of one of `FAMILIES`.
    preprocessing: the config of its image processor; may be empty.
    source: where it comes from, for errors.

  Raises:
    UserError: for an option that this library does not have.
  """
  family = config["model_type"]
  _check(config, family, source)
  defaults = _DEFAULTS[family]
  text, vision = (defaults[tower] | _given(config, tower) for tower in ("text_config", "vision_config"))
  clip = family == "clip"
  size = vision["image_size"]
  if family == "siglip2":
    side = round(vision["num_patches"] ** 0.5)
    size = side * vision["patch_size"]
    if side**2 != vision["num_patches"]:
      raise UserError(f"{source} has vision_config.num_patches={vision['num_patches']}, which must be a square number")
  embed_dim = config.get("projection_dim", defaults.get("projection_dim")) if clip else vision["hidden_size"]
  projection = text.get("projection_size") or text["hidden_size"]
  if not clip and projection != embed_dim:
    raise UserError(
      f"{source} has text_config.projection_size={projection} and vision_config.hidden_size={embed_dim}: captions and"
      " images need embeddings of one size"
    )
  return DualEncoderConfig(
    image=ImageConfig(
      _transformer(vision, source, init="clip" if clip else "xavier"),
      image_size=size,
      patch_size=vision["patch_size"],
      channels=vision["num_channels"],
      pool="cls" if clip else "map",
      class_token=clip,
      pre_norm=clip,
      patch_bias=not clip,
      projection=clip,
      **_seen(preprocessing, family, size, vision, source),
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
    embed_dim=embed_dim,
    init_logit_bias=None if clip else -10.0,
  )


def end_of_text(config: Mapping[str, Any]) -> int | None:
  """Returns the token at which a CLIP model takes the embedding of a caption; None for the other families.

  Args:
    config: the content of `config.json`, as `read_config` takes it.
  """
  if config["model_type"] != "clip":
    return None
  end = _given(config, "text_config").get("eos_token_id", _CLIP_END)
  return _CLIP_END if end is None else end


def write_config(config: DualEncoderConfig, family: str) -> dict[str, Any]:
  """Writes the `config.json` of a family, which may not be able to describe ours: it is read back and compared."""
  image, text = config.image, config.text
  written: dict[str, Any] = {
    "model_type": family,
    "architectures": [{"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[family]],
    "vision_config": _tower(image.transformer) | {"num_channels": image.channels, "patch_size": image.patch_size},
    "text_config": _tower(text.transformer) | {"vocab_size": text.vocab_size, "max_position_embeddings": text.length},
  }
  size = {"num_patches": image.grid**2} if family == "siglip2" else {"image_size": image.image_size}
  written["vision_config"] |= size
  if family == "clip":
    written["projection_dim"] = config.embed_dim
    for tower in ("vision_config", "text_config"):
      written[tower]["projection_dim"] = config.embed_dim
  else:
    # Reading it back shows where `embed_dim` is another number, which the family does not allow.
    written["text_config"]["projection_size"] = image.transformer.width
  return written


def entries(config: DualEncoderConfig, family: str) -> list[Entry]:
  """Returns the key map of a family."""
  image, text, clip = config.image, config.text, family == "clip"
  embeddings = "vision_model.embeddings"
  patches = TRANSPOSED if family == "siglip2" else convolution(image.patch_size)
  table = [
    entry("image/patch_embedding/kernel", f"{embeddings}.patch_embedding.weight", patches),
    entry("image/position", f"{embeddings}.position_embedding.weight"),
    *_layers("image", "vision_model", image.transformer),
    *layer_norm("image/post_norm", "vision_model.post_layernorm"),
    entry("text/tokens", "text_model.embeddings.token_embedding.weight"),
    entry("text/position", TEXT_POSITIONS),
    *_layers("text", "text_model", text.transformer),
    *layer_norm("text/post_norm", "text_model.final_layer_norm"),
    entry("log_logit_scale", "logit_scale", SAME if clip else extended(1)),
  ]
  if clip:
    # A bias that was learned in a model that its config does not give one.
    table += [entry("logit_bias", "logit_bias")] * (config.init_logit_bias is not None)
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
    *pooling_attention("image/pool", f"{head}.attention", heads=image.transformer.heads),
    *layer_norm("image/pool/norm", f"{head}.layernorm"),
    *linear("image/pool/mlp/up", f"{head}.mlp.fc1"),
    *linear("image/pool/mlp/down", f"{head}.mlp.fc2"),
    *linear("text/projection", "text_model.head"),
  ]


def write_preprocessing(config: DualEncoderConfig, family: str, max_patches: int) -> dict[str, Any]:
  """Writes the `preprocessor_config.json` of a family; `max_patches` is the length of a row of "siglip2"."""
  image = config.image
  shared = {
    "image_processor_type": {
      "clip": "CLIPImageProcessor",
      "siglip": "SiglipImageProcessor",
      "siglip2": "Siglip2ImageProcessor",
    }[family],
    "image_mean": list(image.mean),
    "image_std": list(image.std),
    "rescale_factor": 1 / 255,
    "resample": _RESAMPLING_NUMBERS[image.interpolation],
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
  }
  if family == "siglip2":
    return {**shared, "patch_size": image.patch_size, "max_num_patches": max_patches}
  square = {"height": image.image_size, "width": image.image_size}
  if family == "siglip":
    return {**shared, "size": square}
  crop = image.resize == "crop"
  size = {"shortest_edge": image.image_size} if crop else square
  return {**shared, "size": size, "do_center_crop": crop, "crop_size": square}


def _given(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
  # CLIP's configs of 2022 have a tower twice; `transformers` believes this one, with its defaults for what it leaves
  # out.
  first = config.get(f"{tower}_dict")
  return dict((config.get(tower) or {}) if first is None else first)


def _transformer(tower: Mapping[str, Any], source: str, **options: Any) -> TransformerConfig:
  check_choice("hidden_act", tower["hidden_act"], _ACTIVATIONS, source=source)
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


def _check(config: Mapping[str, Any], family: str, source: str) -> None:
  """Refuses options that this library does not have."""
  whole, *towers = huggingface_options.MODELS[family]
  check(config, whole, source=source)
  for tower, table in zip(("text_config", "vision_config"), towers, strict=True):
    for name in (tower, f"{tower}_dict"):
      given = config.get(name) or {}
      check(given, table, source=source, within=name)
      if "model_type" in given:
        types = huggingface_options.TOWER_TYPES[family][tower]
        check_choice(f"{name}.model_type", given["model_type"], types, source=source)


def _seen(
  preprocessing: Mapping[str, Any], family: str, side: int, vision: Mapping[str, Any], source: str
) -> dict[str, Any]:
  """Reads how the image tower sees pictures, as fields of `ImageConfig`."""
  processor = _processor(preprocessing, family, source)
  check(preprocessing, huggingface_options.PREPROCESSING[processor], source=source)
  # What is null has the default of its class.
  given = {name: value for name, value in preprocessing.items() if value is not None}
  if given.get("patch_size", vision["patch_size"]) != vision["patch_size"]:
    raise UserError(
      f"{source} has patch_size={given['patch_size']} in its preprocessing and"
      f" vision_config.patch_size={vision['patch_size']}: they must be equal"
    )
  resample = given.get("resample", 2 if processor == "Siglip2ImageProcessor" else 3)
  if not isinstance(resample, int) or isinstance(resample, bool) or resample not in _RESAMPLING:
    raise UserError(f"{source} has resample={resample!r}, known are 2 (bilinear) and 3 (bicubic)")
  mean, std = _statistics(given, processor, vision["num_channels"], source)
  return {
    "mean": mean,
    "std": std,
    "resize": "squash" if family == "siglip2" else _resize(given, processor, side, source),
    "interpolation": _RESAMPLING[resample],
  }


def _processor(preprocessing: Mapping[str, Any], family: str, source: str) -> str:
  """Returns the class that prepares pictures, whichever its implementation."""
  name, own = "image_processor_type", huggingface_options.PROCESSORS[family]
  if not preprocessing.get(name):
    name = "feature_extractor_type"
  found = preprocessing.get(name) or own
  known = (own,) if family == "siglip2" else tuple(huggingface_options.PROCESSORS.values())[:2]
  if isinstance(found, str):
    plain = found.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if plain in known:
      return plain
  raise UserError(f"{source} has {name}={found!r}: known are {', '.join(known)}")


def _statistics(
  given: Mapping[str, Any], processor: str, channels: int, source: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and deviation that normalise values from 0 to 1, whatever the file rescales and normalises."""
  own = (CLIP_MEAN, CLIP_STD) if processor == "CLIPImageProcessor" else (0.5, 0.5)
  values = [given.get("image_mean", own[0]), given.get("image_std", own[1])]
  if not given.get("do_normalize", True):
    values = [0.0, 1.0]
  mean, std = (tuple(value) if isinstance(value, list | tuple) else (value,) * channels for value in values)
  for name, value in (("image_mean", mean), ("image_std", std)):
    if len(value) != channels:
      raise UserError(
        f"{source} has {name}={list(value)}, which must have vision_config.num_channels={channels} values"
      )
  if min(std) <= 0:
    raise UserError(f"{source} has image_std={list(std)}, which must be above 0")
  # A pixel p becomes (factor * p - mean) / std there, and (p / 255 - mean) / std here.
  factor = 255 * given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 255.0
  if abs(factor - 1) >= 1e-6:
    mean, std = tuple(value / factor for value in mean), tuple(value / factor for value in std)
  for offset, scale in zip(mean, std, strict=True):
    if max(abs(offset), abs(1 - offset), 1.0) > _LARGEST_PIXEL * min(scale, 1.0) or scale > _LARGEST_PIXEL:
      raise UserError(
        f"{source} has image_mean={values[0]}, image_std={values[1]} and"
        f" rescale_factor={given.get('rescale_factor', 1 / 255)}, which make no usable numbers of pixels: mend its"
        " preprocessor_config.json"
      )
  return tuple(map(float, mean)), tuple(map(float, std))


def _resize(given: Mapping[str, Any], processor: str, side: int, source: str) -> str:
  # No version of it takes a number for the side of a square.
  squares = processor == "SiglipImageProcessor"
  cropped = not squares and given.get("do_center_crop", True)
  square = {"height": side, "width": side}
  # A file that does not say has the default of the class; without a file pictures get the size that the model reads.
  default = _DEFAULT_SIDE if given else side
  size = _size(given.get("size", [default, default] if squares else default), "shortest_edge")
  crop = _size(given.get("crop_size", default), "")
  if not cropped and size == square:
    return "squash"
  if cropped and crop == square and size in (square, {"shortest_edge": side}):
    return "squash" if size == square else "crop"
  raise UserError(
    f"{source} has size={given.get('size', default)}, crop_size={given.get('crop_size', default)} and"
    f" do_center_crop={cropped}, which do not give the squares of image_size={side} that its image tower reads: mend"
    " its preprocessor_config.json"
  )


def _size(size: Any, edge: str) -> Any:
  """Returns a size as files since 2023 have it; before, a number was the side called `edge`, or both sides."""
  if isinstance(size, list) and len(size) == 2:
    return {"height": size[0], "width": size[1]}
  if isinstance(size, dict):
    return {name: value for name, value in size.items() if value is not None}
  if isinstance(size, list):
    return size
  return {edge: size} if edge else {"height": size, "width": size}
