"""Imports weights of other libraries as a directory that `contrastive_jax.load`, `init_from` and `eval.py` open."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax import downloads
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.interop import (
  bert,
  big_vision,
  checkpoint_files,
  huggingface,
  huggingface_folders,
  open_clip,
  open_clip_options,
  tokenizer_files,
)
from contrastive_jax.interop.keymap import Entry, to_ours, unwrapped
from contrastive_jax.interop.options import check
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.preprocess import panics, tokenizers
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.runs import write_config
from contrastive_jax.schedule.stages import Stage
from contrastive_jax.stores import scheme
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.state import TrainState

_SIGLIP2_TOKENS = 256_000
# The end of captions in configs of transformers before 2023 and in those of open_clip that do not say.
_LEGACY_END = 2
_HUGGINGFACE_FILES = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_FILES = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
  "model.safetensors",
)


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model of another library in our terms.

  Attributes:
    name: name of the model in results.
    config: the sizes of its towers.
    params: nested dict of float32 arrays, of the text tower alone where the model has no other.
    tokenizer: the tokenizer of the model.
    lengths: row lengths in patches where it reads images at any aspect (NaFlex); empty is fixed resolution.
  """

  name: str
  config: DualEncoderConfig
  params: dict[str, Any]
  tokenizer: Tokenizer
  lengths: tuple[int, ...] = ()


def read(spec: str, tokenizer: str = "") -> Imported:
  """Reads weights of another library.

  Args:
    spec: "huggingface:FOLDER", "open_clip:FOLDER", "open_clip:FILE" with its config JSON beside it, or
      "big_vision:FILE.npz". A folder may be in a bucket, such as "huggingface:s3://bucket/model", and the file of
      big_vision also on the web: both are copied into the cache of `downloads` first.
    tokenizer: "KIND:FILE", as `tokenizers.load` takes it; empty takes the tokenizer that lies beside the weights.

  Raises:
    UserError: if the files are not there, are of a family that this library does not have, or do not fit their config;
      the last names the keys that are missing, unexpected and of another shape.
  """
  kind, _, place = spec.partition(":")
  if kind in READERS and scheme(place):
    path = (downloads.file if kind == "big_vision" else downloads.folder)(kind, place)
  else:
    kind, path = checkpoint_files.split_spec(spec, READERS, "PATH")
  return READERS[kind](path, tokenizer)


def save(imported: Imported, workdir: Path) -> None:
  """Writes a model as a run of no steps: `config.json`, `tokenizer`, `checkpoints/0`.

  Args:
    imported: the model that `read` returned.
    workdir: the directory, which is made, and is there only when it is complete.

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
      state = TrainState(step=jnp.int32(0), params=params, opt_state=None, average=None)
      checkpoints.save(state, {"tokenizer": imported.tokenizer.fingerprint})
      checkpoints.wait()
    write_config(folder, config)


def _huggingface(folder: Path, tokenizer: str) -> Imported:
  name, source = folder.resolve().name, str(folder)
  config = checkpoint_files.read_object(folder / "config.json")
  family = config.get("model_type", "")
  require_known(f"model_type of {folder}", str(family), (*huggingface.FAMILIES, bert.FAMILY))
  if family == bert.FAMILY:
    described = huggingface_folders.sentence_encoder(folder)
    ours = bert.read_config(config, pool=described.pool, source=source)
    if described.width not in (None, ours.embed_dim):
      raise UserError(f"{source} pools vectors of {described.width} numbers, and its config.json has {ours.embed_dim}")
    found = _tokenizer(tokenizer, lambda: tokenizer_files.read(folder, unnamed="BertTokenizer"), ours)
    arrays = bert.bare(checkpoint_files.read_folder(folder, _HUGGINGFACE_FILES), source=source)
    shorter = _shortened(ours, described.length, None if tokenizer else tokenizer_files.longest(folder))
    arrays = _cut(arrays, bert.POSITIONS, ours, shorter, source)
    return Imported(name, shorter, bert.read_params(arrays, shorter, source=source), found)
  preprocessing = huggingface_folders.preprocessing(folder)
  ours = huggingface.read_config(config, preprocessing, source=source)
  # SigLIP 2 is trained on lower-cased captions, whichever class its tokenizer is saved under.
  lower = family != "clip" and ours.text.vocab_size == _SIGLIP2_TOKENS
  found = _tokenizer(tokenizer, lambda: tokenizer_files.read(folder, clean="lower" if lower else ""), ours)
  end = huggingface.end_of_text(config)
  if end is not None:
    # Number 2 is that of old configs, whose captions are said to end at their largest token.
    _check_end(found, None if end == _LEGACY_END else end, f"{source} has text_config.eos_token_id={end}")
  arrays = unwrapped(checkpoint_files.read_folder(folder, _HUGGINGFACE_FILES), source=source)
  shorter = _shortened(ours, None if tokenizer else tokenizer_files.longest(folder))
  arrays = _cut(arrays, huggingface.TEXT_POSITIONS, ours, shorter, source)
  ours = _with_bias(shorter, arrays)
  params = _params(huggingface.entries(ours, family), arrays, ours, source, huggingface.IGNORED)
  # A file that does not say has the default of its class; without a file rows are as long as the model's positions.
  default = huggingface.DEFAULT_PATCHES if preprocessing else ours.image.grid**2
  lengths = (preprocessing.get("max_num_patches") or default,) if family == "siglip2" else ()
  return Imported(name, ours, params, found, lengths)


def _open_clip(path: Path, tokenizer: str) -> Imported:
  folder, source = path if path.is_dir() else path.parent, str(path)
  found = [folder / "open_clip_config.json", *([] if path.is_dir() else [path.with_suffix(".json")])]
  described = next((checkpoint_files.read_object(file) for file in found if file.is_file()), None)
  if described is None:
    raise UserError(f"{path} has no config beside it: it needs {' or '.join(str(file) for file in found)}")
  if "model_cfg" in described:
    check(described, open_clip_options.FILE, source=source)
  config, preprocessing = described.get("model_cfg", described), described.get("preprocess_cfg") or {}
  ours = open_clip.read_config(config, preprocessing, source=source)
  text = config["text_cfg"]
  kwargs, foreign = text.get("tokenizer_kwargs") or {}, bool(text.get("hf_tokenizer_name"))
  table = open_clip_options.TOKENIZER if foreign else open_clip_options.CLIP_TOKENIZER
  check(kwargs, table, source=source, within="text_cfg.tokenizer_kwargs")
  if foreign:
    own = functools.partial(tokenizer_files.read, folder, clean=kwargs.get("clean", ""), mended=True)
  else:
    own = functools.partial(tokenizer_files.clip, folder)
  fitting = _tokenizer(tokenizer, own, ours)
  if ours.text.pool == "eos":
    named = text.get("pool_type") == "eos"
    end = text.get("eos_id", _LEGACY_END) if named else None
    _check_end(fitting, end, f"{source} has text_cfg.{f'eos_id={end}' if named else 'pool_type=argmax'}")
  arrays = checkpoint_files.read_folder(path, _OPEN_CLIP_FILES) if path.is_dir() else _one_file(path)
  arrays = unwrapped(arrays, source=source)
  custom_text = any(name.startswith("text.") for name in arrays)
  ours = _with_bias(ours, arrays)
  entries = open_clip.entries(ours, custom_text=custom_text)
  params = _params(entries, arrays, ours, source, open_clip.IGNORED)
  # Names of folders hold dots, such as that before the data of a published model.
  name = path.resolve().name if path.is_dir() else path.stem
  return Imported(name, ours, params, fitting)


def _one_file(path: Path) -> dict[str, Any]:
  if path.suffix == ".npz":
    raise UserError(f"{path} is of big_vision's format, whose names are others: import it as big_vision:{path}")
  return checkpoint_files.read(path)


def _big_vision(path: Path, tokenizer: str) -> Imported:
  if not tokenizer:
    raise UserError(f"{path} holds no tokenizer: give its SentencePiece model as --tokenizer=sentencepiece:FILE")
  arrays = big_vision.parameters(checkpoint_files.read(path, suffixes=(".npz",)))
  ours = big_vision.read_config(arrays, source=str(path))
  found = _fitting(_named(tokenizer, ours, canonical=False), ours)
  return Imported(path.stem, ours, _params(big_vision.entries(ours), arrays, ours, str(path)), found)


READERS: dict[str, Callable[[Path, str], Imported]] = {
  "huggingface": _huggingface,
  "open_clip": _open_clip,
  "big_vision": _big_vision,
}


def _with_bias(config: DualEncoderConfig, arrays: dict[str, Any]) -> DualEncoderConfig:
  """Returns the config with the logit bias that the weights hold, whether their config mentions it or not."""
  if config.init_logit_bias is not None or "logit_bias" not in arrays:
    return config
  return dataclasses.replace(config, init_logit_bias=0.0)


def _shortened(config: DualEncoderConfig, *limits: int | None) -> DualEncoderConfig:
  """Returns the config with captions as long as the files beside the weights allow; later positions are never used."""
  length = min(config.text.length, *(limit for limit in limits if limit is not None), config.text.length)
  return dataclasses.replace(config, text=dataclasses.replace(config.text, length=length))


def _cut(
  arrays: dict[str, Any], positions: str, config: DualEncoderConfig, shorter: DualEncoderConfig, source: str
) -> dict[str, Any]:
  """Returns the arrays without the positions of captions that the shorter config does not reach.

  Raises:
    UserError: if the table does not have the positions of the whole config, which the shorter one would hide.
  """
  table = arrays.get(positions)
  if table is None or table.ndim != 2:
    return arrays
  if len(table) != config.text.length:
    raise UserError(
      f"{source} has max_position_embeddings={config.text.length} and {len(table)} positions in {positions}: copy both"
      " files again"
    )
  return {**arrays, positions: table[: shorter.text.length]}


def _check_end(tokenizer: Tokenizer, end: int | None, said: str) -> None:
  """Refuses a tokenizer whose captions end elsewhere than where the model takes their embedding.

  Args:
    tokenizer: the tokenizer of the model.
    end: number of the token at which the embedding is taken; None is the largest number of a caption.
    said: the file and the option that says it, for errors.

  Raises:
    UserError: naming both tokens.
  """
  found = tokenizer_files.special_ids(tokenizer)["eos_token_id"]
  wanted = tokenizer.vocab_size - 1 if end is None else end
  if found != wanted:
    largest = ", which takes embeddings at the largest token," if end is None else ""
    raise UserError(
      f"{said}{largest} and its tokenizer ends captions with token {found} instead of {wanted}: it is another model's"
    )
  tokens, mask = tokenizer(["a dog"], 64)
  # Other libraries take the first token of this number.
  if found in tokens[0][mask[0]][:-1]:
    raise UserError(f"{said}, and its tokenizer puts token {found} before the end of captions: copy its files again")


def _params(
  entries: Sequence[Entry], arrays: dict[str, Any], config: DualEncoderConfig, source: str, ignored: Sequence[str] = ()
) -> dict[str, Any]:
  _, abstract = dual_encoder.abstract(config)
  return to_ours(entries, arrays, abstract, source=source, ignored=ignored)


def _tokenizer(spec: str, own: Callable[[], Tokenizer], config: DualEncoderConfig) -> Tokenizer:
  try:
    with panics.as_errors():
      return _fitting(_named(spec, config, canonical=True) if spec else own(), config)
  except panics.PanicError as error:
    raise UserError(f"the tokenizer cannot be used, since the tokenizers library fails on it ({error})") from error


def _named(spec: str, config: DualEncoderConfig, *, canonical: bool) -> Tokenizer:
  """Loads the tokenizer that a user names; a SentencePiece model is used as SigLIP's."""
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
