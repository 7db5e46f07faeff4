"""Weights of others as a directory that `contrastive_jax.load`, `init_from` and `eval.py` open like a run."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.interop import bert, big_vision, checkpoint_files, huggingface, open_clip, tokenizer_files
from contrastive_jax.interop.keymap import Entry, to_ours
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.runs import write_config
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.stages import Stage
from contrastive_jax.training.state import TrainState

_SIGLIP2_TOKENS = 256_000
_HUGGINGFACE_FILES = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_FILES = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
  "model.safetensors",
)


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model of others in our terms.

  Attributes:
    name: what results call it.
    config: of the towers.
    params: nested dict of float32 arrays, of the text tower alone where that is all there is.
    tokenizer: its own.
    lengths: row lengths in patches where it reads images at any aspect (NaFlex); empty is fixed resolution.
  """

  name: str
  config: DualEncoderConfig
  params: dict[str, Any]
  tokenizer: Tokenizer
  lengths: tuple[int, ...] = ()


def read(spec: str, tokenizer: str = "") -> Imported:
  """Reads weights of others.

  Args:
    spec: "huggingface:FOLDER", "open_clip:FOLDER", "open_clip:FILE" with its config JSON beside it, or
      "big_vision:FILE.npz".
    tokenizer: "KIND:FILE", see `tokenizers.load`; empty takes what lies beside the weights.

  Raises:
    UserError: if the files are not there, are of a family that this library does not have, or do not fit their config;
      the last names the keys that are missing, unexpected and of another shape.
  """
  kind, path = checkpoint_files.split_spec(spec, READERS, "PATH")
  return READERS[kind](path, tokenizer)


def save(imported: Imported, workdir: Path) -> None:
  """Writes a model as a run of no steps: `config.json`, `tokenizer`, `checkpoints/0`.

  Args:
    imported: see `read`.
    workdir: is made, and is there only when it is complete.

  Raises:
    UserError: if there is something in the directory.
  """
  model = dataclasses.asdict(imported.config)
  config = {"name": imported.name, "compute_dtype": model.pop("dtype"), "model": model, "curriculum": []}
  if imported.lengths:
    config["curriculum"] = [dataclasses.asdict(Stage("imported", mode="naflex", lengths=imported.lengths))]
  params = jax.tree.map(jnp.asarray, imported.params)
  with checkpoint_files.new_folder(workdir) as folder:
    imported.tokenizer.save(folder / "tokenizer")
    with Checkpoints(folder / "checkpoints") as checkpoints:
      state = TrainState(step=jnp.int32(0), params=params, slots=None, average=None)
      checkpoints.save(state, {"tokenizer": imported.tokenizer.fingerprint})
      checkpoints.wait()
    write_config(folder, config)


def _huggingface(folder: Path, tokenizer: str) -> Imported:
  name = folder.resolve().name
  config = checkpoint_files.read_json(folder / "config.json")
  family = config.get("model_type", "")
  require_known(f"model_type of {folder}", family, (*huggingface.FAMILIES, bert.FAMILY))
  if family == bert.FAMILY:
    ours = bert.read_config(config, pool=_sentence_pool(folder), source=str(folder))
    found = _tokenizer(tokenizer, lambda: tokenizer_files.read(folder), ours)
    arrays = checkpoint_files.read_folder(folder, _HUGGINGFACE_FILES)
    return Imported(name, ours, bert.read_params(arrays, ours, source=str(folder)), found)
  preprocessing = _preprocessing(folder)
  ours = huggingface.read_config(config, preprocessing, source=str(folder))
  # SigLIP 2 is trained on lower-cased captions, whichever class its tokenizer is saved under.
  lower = family != "clip" and ours.text.vocab_size == _SIGLIP2_TOKENS
  found = _tokenizer(tokenizer, lambda: tokenizer_files.read(folder, clean="lower" if lower else ""), ours)
  arrays = checkpoint_files.read_folder(folder, _HUGGINGFACE_FILES)
  params = _params(huggingface.entries(ours, family), arrays, ours, str(folder), huggingface.IGNORED)
  lengths = (preprocessing.get("max_num_patches") or ours.vision.grid**2,) if family == "siglip2" else ()
  return Imported(name, ours, params, found, lengths)


def _preprocessing(folder: Path) -> dict[str, Any]:
  # Since version 5 `transformers` keeps it inside the processor's file.
  for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
    if (folder / name).is_file():
      described = checkpoint_files.read_json(folder / name)
      described = described if part is None else described.get(part)
      if described:
        return described
  return {}


def _sentence_pool(folder: Path) -> str:
  modules = checkpoint_files.read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
  paths = [folder / module["path"] / "config.json" for module in modules if module["type"].endswith("Pooling")]
  pooling = checkpoint_files.read_json(paths[0]) if paths else {}
  return bert.read_pool(modules, pooling, source=str(folder))


def _open_clip(path: Path, tokenizer: str) -> Imported:
  folder = path if path.is_dir() else path.parent
  found = [folder / "open_clip_config.json", *([] if path.is_dir() else [path.with_suffix(".json")])]
  described = next((checkpoint_files.read_json(file) for file in found if file.is_file()), None)
  if described is None:
    raise UserError(f"{path} has no config beside it: it needs {' or '.join(str(file) for file in found)}")
  config, preprocessing = described.get("model_cfg", described), described.get("preprocess_cfg", {})
  ours = open_clip.read_config(config, preprocessing, source=str(path))
  text = config["text_cfg"]
  options = text.get("tokenizer_kwargs") or {}
  if set(options) - {"clean"}:
    raise UserError(f"{path} has tokenizer_kwargs={options}: only 'clean' is known")
  if text.get("hf_tokenizer_name"):
    own = functools.partial(tokenizer_files.read, folder, clean=options.get("clean", ""))
  else:
    own = functools.partial(tokenizer_files.clip, folder)
  fitting = _tokenizer(tokenizer, own, ours)
  arrays = checkpoint_files.read_folder(path, _OPEN_CLIP_FILES) if path.is_dir() else checkpoint_files.read(path)
  custom_text = any(name.startswith("text.") for name in arrays)
  entries = open_clip.entries(ours, custom_text=custom_text)
  params = _params(entries, arrays, ours, str(path), open_clip.IGNORED)
  # Names of folders hold dots, such as that before the data of a published model.
  name = path.resolve().name if path.is_dir() else path.stem
  return Imported(name, ours, params, fitting)


def _big_vision(path: Path, tokenizer: str) -> Imported:
  if not tokenizer:
    raise UserError(f"{path} holds no tokenizer: give its SentencePiece model as --tokenizer=sentencepiece:FILE")
  arrays = big_vision.parameters(checkpoint_files.read(path))
  ours = big_vision.read_config(arrays, source=str(path))
  found = _fitting(_named(tokenizer, ours, canonical=False), ours)
  return Imported(path.stem, ours, _params(big_vision.entries(ours), arrays, ours, str(path)), found)


READERS: dict[str, Callable[[Path, str], Imported]] = {
  "huggingface": _huggingface,
  "open_clip": _open_clip,
  "big_vision": _big_vision,
}


def _params(
  entries: Sequence[Entry], arrays: dict[str, Any], config: DualEncoderConfig, source: str, ignored: Sequence[str] = ()
) -> dict[str, Any]:
  _, abstract = dual_encoder.abstract(config)
  return to_ours(entries, arrays, abstract, source=source, ignored=ignored)


def _tokenizer(spec: str, own: Callable[[], Tokenizer], config: DualEncoderConfig) -> Tokenizer:
  return _fitting(_named(spec, config, canonical=True) if spec else own(), config)


def _named(spec: str, config: DualEncoderConfig, *, canonical: bool) -> Tokenizer:
  """The tokenizer that a user names; a SentencePiece model is used as SigLIP's."""
  if not spec.startswith("sentencepiece:"):
    return tokenizers.load(spec)
  # Of SigLIP big_vision asks for lower=True and pad_value=1, of SigLIP 2 for the padding that its model has.
  second = config.text.vocab_size == _SIGLIP2_TOKENS
  return tokenizers.load(spec, lowercase=True, canonical=canonical and not second, pad="" if second else "</s>")


def _fitting(tokenizer: Tokenizer, config: DualEncoderConfig) -> Tokenizer:
  if tokenizer.vocab_size > config.text.vocab_size:
    raise UserError(
      f"the tokenizer has {tokenizer.vocab_size} tokens and the text tower {config.text.vocab_size}: it is another"
      " model's"
    )
  return tokenizer
