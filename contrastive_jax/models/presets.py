"""Presets: the published sizes of dual encoders by name, and overriding their fields."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, OtherConfig, TextConfig, TransformerConfig
from contrastive_jax.models.others import OTHERS


class Size(typing.NamedTuple):
  """The shape of a transformer."""

  width: int
  depth: int
  heads: int
  mlp_dim: int


# Vision transformers: Table 2 of Scaling Vision Transformers (arXiv 2106.04560); So400m: arXiv 2305.13035.
SIZES = {
  "Ti": Size(192, 12, 3, 768),
  "S": Size(384, 12, 6, 1536),
  "B": Size(768, 12, 12, 3072),
  "L": Size(1024, 24, 16, 4096),
  "So400m": Size(1152, 27, 16, 4304),
  "H": Size(1280, 32, 16, 5120),
  "g": Size(1408, 40, 16, 6144),
}

# Of the pixels that CLIP was trained on.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Text towers and embedding widths that CLIP (B, L) and open_clip (S, H, g) pair with them; Ti and So400m are ours.
_CLIP_TEXT = {
  "Ti": (Size(192, 12, 3, 768), 192),
  "S": (Size(384, 12, 6, 1536), 384),
  "B": (Size(512, 12, 8, 2048), 512),
  "L": (Size(768, 12, 12, 3072), 768),
  "So400m": (Size(1024, 24, 16, 4096), 1024),
  "H": (Size(1024, 24, 16, 4096), 1024),
  "g": (Size(1024, 24, 16, 4096), 1024),
}


def _clip(size: str, patch_size: int, image_size: int = 224) -> DualEncoderConfig:
  """CLIP (arXiv 2103.00020) as OpenAI released it."""
  shared = {"norm_eps": 1e-5, "activation": "quick_gelu", "init": "clip"}
  text_size, embed_dim = _CLIP_TEXT[size]
  return DualEncoderConfig(
    image=ImageConfig(
      TransformerConfig(*SIZES[size], **shared),
      image_size,
      patch_size,
      pool="cls",
      class_token=True,
      pre_norm=True,
      patch_bias=False,
      projection=True,
      mean=CLIP_MEAN,
      std=CLIP_STD,
    ),
    text=TextConfig(TransformerConfig(*text_size, causal=True, **shared), vocab_size=49408, length=77),
    embed_dim=embed_dim,
  )


def _siglip(size: str, patch_size: int, image_size: int = 224) -> DualEncoderConfig:
  """SigLIP (arXiv 2303.15343) as in `transformers`; the text tower of g is So400m, as in SigLIP 2."""
  text_size = "So400m" if size == "g" else size
  return DualEncoderConfig(
    image=ImageConfig(TransformerConfig(*SIZES[size], activation="gelu_tanh"), image_size, patch_size),
    text=TextConfig(
      TransformerConfig(*SIZES[text_size], activation="gelu_tanh"),
      vocab_size=32000,
      length=64,
      pool="last",
      attend_padding=True,
      projection_bias=True,
    ),
    embed_dim=SIZES[size].width,
    init_logit_scale=float(np.log(10.0)),
    init_logit_bias=-10.0,
  )


# UniViTAR (arXiv 2504.01792): 0.3B as in its released configuration, 0.6B as in Table 1 of LongCat-Flash-Omni's report.
# Of the 1B only the number of parameters is published: this width, depth and inner size give it, the heads are a guess.
_UNIVITAR = {
  "0.3b": Size(1024, 24, 16, 2816),
  "0.6b": Size(1280, 32, 16, 3456),
  "1b": Size(1920, 32, 24, 5120),
}


def _univitar(size: str) -> DualEncoderConfig:
  """UniViTAR's blocks. The paper tells neither its head nor its text tower: attention pooling and So400m's are ours.

  The text tower does not attend to padding, so that captions can be packed.
  """
  width, depth, heads, inner = _UNIVITAR[size]
  blocks = TransformerConfig(
    width,
    depth,
    heads,
    inner,
    norm="rmsnorm",
    activation="swiglu",
    qk_norm="full",
    qkv_bias=False,
    mlp_norm=True,
    layer_scale=0.1,
    rope="2d",
  )
  return DualEncoderConfig(
    image=ImageConfig(
      blocks,
      image_size=224,
      patch_size=14,
      tubelet=2,
      position="none",
      projection=True,
      projection_bias=True,
      mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225),
    ),
    text=TextConfig(
      TransformerConfig(*SIZES["So400m"], activation="gelu_tanh"),
      vocab_size=32000,
      length=64,
      pool="map",
      projection_bias=True,
    ),
    embed_dim=1152,
    init_logit_scale=float(np.log(10.0)),
    init_logit_bias=-10.0,
  )


PRESETS: dict[str, DualEncoderConfig] = {
  "clip_ti16": _clip("Ti", 16),
  "clip_s16": _clip("S", 16),
  "clip_b32": _clip("B", 32),
  "clip_b16": _clip("B", 16),
  "clip_l14": _clip("L", 14),
  "clip_so400m14": _clip("So400m", 14),
  "clip_h14": _clip("H", 14),
  "clip_g14": _clip("g", 14),
  "siglip_ti16": _siglip("Ti", 16),
  "siglip_s16": _siglip("S", 16),
  "siglip_b16": _siglip("B", 16),
  "siglip_l16": _siglip("L", 16),
  "siglip_so400m14": _siglip("So400m", 14),
  "siglip_so400m14_384": _siglip("So400m", 14, 384),
  "siglip_h14": _siglip("H", 14),
  "siglip_g16": _siglip("g", 16),
  **{f"univitar_{size}": _univitar(size) for size in _UNIVITAR},
}


def resolve(preset: str, overrides: Mapping[str, Any] | None = None) -> DualEncoderConfig:
  """Returns a preset with some of its fields replaced.

  Nothing is derived from an override: a narrower tower usually wants other `heads` and `mlp_dim` too.

  Args:
    preset: a name in `PRESETS`.
    overrides: nested like the configuration: `{"image": {"transformer": {"depth": 4}}, "embed_dim": 128}`.

  Raises:
    UserError: for an unknown preset or field, a value of the wrong type, or fields that contradict each other.
  """
  if preset not in PRESETS:
    raise UserError(f"preset='{preset}' is unknown{nearest(preset, PRESETS)}: choose one of {', '.join(PRESETS)}")
  return _override(PRESETS[preset], overrides or {}, "model")


def _override(config: Any, overrides: Mapping[str, Any], where: str) -> Any:
  fields = typing.get_type_hints(type(config))
  values = {}
  for name, value in overrides.items():
    if name not in fields:
      raise UserError(f"{where}.{name} is not a field{nearest(name, fields)}: {where} has {', '.join(fields)}")
    if fields[name] == tuple[OtherConfig, ...]:
      values[name] = _others(value, f"{where}.{name}")
    elif dataclasses.is_dataclass(fields[name]):
      if not isinstance(value, Mapping):
        raise UserError(f"{where}.{name}={value!r} must be a mapping of fields to override")
      values[name] = _override(getattr(config, name), value, f"{where}.{name}")
    else:
      values[name] = _convert(value, fields[name], f"{where}.{name}")
  return dataclasses.replace(config, **values)


def _others(entries: Any, where: str) -> tuple[OtherConfig, ...]:
  """Returns the towers that entries describe: mappings with the name of each, and the fields that differ."""
  if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
    raise UserError(f"{where}={entries!r} must be a list of towers, each with its name and fields")
  made = []
  for place, entry in enumerate(entries):
    name = entry.get("name")
    require_known(f"{where}.{place}.name", name, OTHERS)
    made.append(_override(OTHERS[name](name=name), entry, f"{where}.{place}"))
  return tuple(made)


def _convert(value: Any, kind: Any, where: str) -> Any:
  """Returns a value as a `kind`: an int will do for a float and a list for a tuple, nothing else is changed."""
  if typing.get_origin(kind) is tuple:
    if isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
      return tuple(float(item) for item in value)
    raise UserError(f"{where}={value!r} must be a list of numbers")
  options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  if float in options and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) in options:
    return value
  expected = " or ".join("None" if option is types.NoneType else option.__name__ for option in options)
  raise UserError(f"{where}={value!r} must be of type {expected}")


def model_config(config: ConfigDict | Mapping[str, Any]) -> DualEncoderConfig:
  """Returns the dual encoder of a resolved config (a `ConfigDict`, or the dictionary read from `config.json`).

  Raises:
    UserError: if it describes no model.
  """
  for field in ("model", "compute_dtype"):
    if field not in config:
      raise UserError(f"the config lacks {field}: put back the original config.json")
  return dataclasses.replace(resolve("siglip_b16", plain(config["model"])), dtype=config["compute_dtype"])


def plain(node: Any) -> Any:
  """Returns a part of a config with dictionaries for the `ConfigDict`s in it; what JSON holds stays as it is."""
  node = node.to_dict() if hasattr(node, "to_dict") else node
  if isinstance(node, Mapping):
    return {name: plain(value) for name, value in node.items()}
  return type(node)(plain(item) for item in node) if isinstance(node, list | tuple) else node


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a dataclass that JSON may have held: its lists are tuples."""
  return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
