"""Writes runs as folders that `transformers` and open_clip open: weights, config, preprocessing and tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop import checkpoint_files, huggingface, open_clip, tokenizer_files
from contrastive_jax.interop.keymap import to_theirs
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.tokenizers import JsonTokenizer, Tokenizer

# Fields that other libraries need not know: what training alone reads, the type of matrix products, and the size of a
# table that `time_position` would have.
_UNTOLD = (
  "init",
  "remat",
  "unroll",
  "attention_kernel",
  "drop_path",
  "dropout",
  "init_logit_scale",
  "dtype",
  "max_time",
)
# At this id `transformers` takes a CLIP checkpoint for an old one, whose captions end at their largest id.
_LEGACY_EOS = 2


def write(
  spec: str,
  config: DualEncoderConfig,
  params: Mapping[str, Any],
  tokenizer: Tokenizer,
  *,
  resolution: Resolution | None = None,
) -> str:
  """Writes a model for another library.

  Args:
    spec: "huggingface:FOLDER" or "open_clip:FOLDER"; the folder is made, and is there only when it is complete.
    config: the sizes of the model's towers.
    params: nested dict of the model's arrays.
    tokenizer: the tokenizer of the model.
    resolution: the resolution at which it reads images, such as `Model.views.resolution`; None is fixed at
      `image.image_size`.

  Returns:
    The family it was written as.

  Raises:
    UserError: if the other library has no such model, naming what differs, or the folder is not empty.
  """
  kind, path = checkpoint_files.split_spec(spec, WRITERS, "FOLDER")
  config, params = _without_tap(config, params)
  patches = _patches(config, resolution or Resolution.fixed(config.image.image_size))
  with checkpoint_files.new_folder(path) as folder:
    return WRITERS[kind](folder, config, params, tokenizer, patches)


def _without_tap(config: DualEncoderConfig, params: Mapping[str, Any]) -> tuple[DualEncoderConfig, Mapping[str, Any]]:
  """Leaves out the text tower's tap, which has no part in the embeddings that other libraries compute."""
  if not config.text.tap:
    return config, params
  text = {name: part for name, part in params["text"].items() if name != "tap"}
  return dataclasses.replace(config, text=dataclasses.replace(config.text, tap=0)), {**params, "text": text}


def _patches(config: DualEncoderConfig, resolution: Resolution) -> int:
  """Returns the most patches of an image that is read at any aspect (NaFlex); 0 where images are squares."""
  size = config.image.image_size
  if resolution.mode == "naflex":
    return max(resolution.lengths)
  if resolution.mode == "native" or resolution.size != size:
    how = "their own size" if resolution.mode == "native" else f"{resolution.size} pixels"
    raise UserError(
      f"the run ends with images of {how}, and other libraries read squares of model.image.image_size={size} or fill"
      " rows of one length: end the run with a stage of that size or of mode='naflex'"
    )
  return 0


def _huggingface(
  folder: Path, config: DualEncoderConfig, params: Mapping[str, Any], tokenizer: Tokenizer, patches: int
) -> str:
  if patches:
    # Neither matters to images of any aspect.
    side = config.image.grid * config.image.patch_size
    image = dataclasses.replace(config.image, resize="squash", image_size=side)
    config = dataclasses.replace(config, image=image)

  def read_back(family: str) -> DualEncoderConfig:
    preprocessing = huggingface.write_preprocessing(config, family, patches)
    return huggingface.read_config(huggingface.write_config(config, family), preprocessing, source="it")

  family = _fitting(config, ("siglip2",) if patches else ("clip", "siglip"), read_back, "huggingface")
  written = huggingface.write_config(config, family)
  ids = tokenizer_files.special_ids(tokenizer)
  if family == "clip" and ids["eos_token_id"] == _LEGACY_EOS:
    raise UserError(f"transformers cannot read captions that end in token {_LEGACY_EOS}: use another tokenizer")
  if isinstance(tokenizer, JsonTokenizer) and tokenizer_files.canonicalises(tokenizer):
    raise UserError("transformers has no tokenizer of this kind that drops punctuation: export to open_clip")
  written["text_config"] |= ids
  tokenizer_files.write(tokenizer, folder, config.text.length)
  _write(folder / "model.safetensors", huggingface.entries(config, family), params)
  _write_json(folder / "preprocessor_config.json", huggingface.write_preprocessing(config, family, patches))
  _write_json(folder / "config.json", written)
  return family


def _open_clip(
  folder: Path, config: DualEncoderConfig, params: Mapping[str, Any], tokenizer: Tokenizer, patches: int
) -> str:
  if patches:
    raise UserError("open_clip has no model of this kind that reads images at any aspect: export to huggingface")
  preprocessing = open_clip.write_preprocessing(config)
  written = open_clip.write_config(config)
  described = open_clip.read_config(written, preprocessing, source="it")
  custom_text = written.get("custom_text", False)
  family = _fitting(config, ("CustomTextCLIP" if custom_text else "CLIP",), lambda _: described, "open_clip")
  if not tokenizer_files.is_clip(tokenizer):
    # The tokenizer is read from beside the config, whatever it is called here.
    written["text_cfg"]["hf_tokenizer_name"] = "beside"
    if tokenizer_files.canonicalises(tokenizer):
      written["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    if config.text.pool == "eos":
      written["text_cfg"] |= {"pool_type": "eos", "eos_id": tokenizer_files.special_ids(tokenizer)["eos_token_id"]}
  entries = open_clip.entries(config, custom_text=custom_text)
  tokenizer_files.write(tokenizer, folder, config.text.length)
  _write(folder / "open_clip_model.safetensors", entries, params)
  _write_json(folder / "open_clip_config.json", {"model_cfg": written, "preprocess_cfg": preprocessing})
  return family


WRITERS: dict[str, Callable[..., str]] = {"huggingface": _huggingface, "open_clip": _open_clip}


def _fitting(
  config: DualEncoderConfig, families: tuple[str, ...], read_back: Callable[[str], DualEncoderConfig], library: str
) -> str:
  """Returns the family whose config, read back, equals ours."""
  found = {family: list(_differences(_essence(config), _essence(read_back(family)))) for family in families}
  closest = min(found, key=lambda family: len(found[family]))
  if found[closest]:
    raise UserError(
      f"{library} has no model of this kind; the nearest, {closest}, differs in {', '.join(found[closest])}"
    )
  return closest


def _essence(config: DualEncoderConfig) -> dict[str, Any]:
  essence = _told(dataclasses.asdict(config))
  essence["init_logit_bias"] = config.init_logit_bias is not None
  return essence


def _told(node: Any) -> Any:
  if not isinstance(node, dict):
    return node
  return {name: _told(value) for name, value in node.items() if name not in _UNTOLD}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = "") -> Iterator[str]:
  for name, value in ours.items():
    if isinstance(value, Mapping):
      yield from _differences(value, theirs[name], f"{where}{name}.")
    elif value != theirs[name]:
      yield f"model.{where}{name}={value!r} instead of {theirs[name]!r}"


def _write(path: Path, entries: list, params: Mapping[str, Any]) -> None:
  checkpoint_files.write_safetensors(path, to_theirs(entries, params))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
