"""The files of a Hugging Face model that say how images and sentences are read; its tokenizer has its own module."""

from pathlib import Path
from typing import Any, NamedTuple

from contrastive_jax.errors import UserError
from contrastive_jax.interop import bert, checkpoint_files
from contrastive_jax.interop import huggingface_options as options
from contrastive_jax.interop.options import check


class SentenceEncoder(NamedTuple):
  """The description of a text encoder in the files of sentence-transformers.

  Attributes:
    pool: the pooling, as in `TextConfig.pool`.
    length: the number of tokens of the longest sentence; None where they do not say.
    width: the number of features of a pooled vector; None where they do not say.
  """

  pool: str
  length: int | None
  width: int | None


def preprocessing(folder: Path) -> dict[str, Any]:
  """Returns the options of a model's image processor, and nothing where no file has them.

  Args:
    folder: the folder of the model.

  Raises:
    UserError: if a file is damaged, or two files contradict each other.
  """
  own, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
  given = checkpoint_files.read_object(own) if own.is_file() else {}
  # Since version 5 `transformers` keeps them inside the processor's file.
  described = checkpoint_files.read_object(whole) if whole.is_file() else {}
  check(described, options.PROCESSOR, source=str(whole))
  inner = described.get("image_processor") or {}
  odd = next((name for name in given if name in inner and given[name] != inner[name]), None)
  if odd is not None:
    raise UserError(
      f"{folder} has {odd}={given[odd]!r} in {own.name} and {odd}={inner[odd]!r} in {whole.name}: remove the wrong file"
    )
  return {**given, **inner}


def sentence_encoder(folder: Path) -> SentenceEncoder:
  """Reads the files that sentence-transformers puts beside a BERT-style encoder.

  Args:
    folder: the folder of the model.

  Raises:
    UserError: for a module or an option that the text tower does not have.
  """
  for name, table in (
    ("config_sentence_transformers.json", options.SENTENCES),
    ("sentence_bert_config.json", options.SENTENCE_ENCODER),
  ):
    if (folder / name).is_file():
      check(checkpoint_files.read_object(folder / name), table, source=str(folder / name))
  limits = folder / "sentence_bert_config.json"
  length = checkpoint_files.read_object(limits).get("max_seq_length") if limits.is_file() else None
  listed = folder / "modules.json"
  modules = checkpoint_files.read_json(listed) if listed.is_file() else []
  if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
    raise UserError(f"{listed} must hold a list of modules: copy it again")
  for module in modules:
    check(module, options.MODULE, source=str(listed))
    if "type" not in module or "path" not in module:
      raise UserError(f"{listed} has a module without type or path, {module}: copy it again")
    if module["type"].endswith("Transformer") and module["path"]:
      raise UserError(f"{listed} has its model in the folder {module['path']!r}: import {folder / module['path']}")
  paths = [folder / module["path"] / "config.json" for module in modules if module["type"].endswith("Pooling")]
  pooling = checkpoint_files.read_object(paths[0]) if paths else {}
  pool = bert.read_pool(modules, pooling, source=str(folder))
  width = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
  return SentenceEncoder(pool, length, width)
