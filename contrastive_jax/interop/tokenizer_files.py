"""Tokenizers as Hugging Face and open_clip keep them beside their weights, read into ours and written back."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import ClipTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer

_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Packages that ship CLIP's merges.
_CLIP_PACKAGES = ("open_clip", "clip")
# Classes of tokenizers that lower-case what their file leaves as it is; the first also drops punctuation.
_CANONICAL, _LOWERCASE = ("SiglipTokenizer",), ("SiglipTokenizer", "Siglip2Tokenizer")


def read(folder: Path, *, clean: str = "") -> Tokenizer:
  """The tokenizer in a folder of a Hugging Face model.

  Args:
    folder: holds `tokenizer.json`, `spiece.model` or `merges.txt`.
    clean: "lower" lower-cases captions whatever the files say, "canonicalize" also drops punctuation.

  Raises:
    UserError: if there is none.
  """
  settings = _settings(folder)
  kind = settings.get("tokenizer_class", "").removesuffix("Fast")
  prepared = {
    "lowercase": clean in ("lower", "canonicalize") or kind in _LOWERCASE,
    "canonical": clean == "canonicalize" or kind in _CANONICAL,
  }
  if (folder / "tokenizer.json").is_file():
    pad = settings.get("pad_token") or ""
    pad = pad["content"] if isinstance(pad, dict) else pad
    literal = bool(settings.get("split_special_tokens", False))
    return tokenizers.load(f"file:{folder / 'tokenizer.json'}", literal=literal, pad=pad, **prepared)
  if (folder / "spiece.model").is_file():
    return tokenizers.load(f"sentencepiece:{folder / 'spiece.model'}", **prepared)
  if (folder / "merges.txt").is_file():
    return tokenizers.load(f"clip:{folder / 'merges.txt'}")
  raise UserError(
    f"{folder} has no tokenizer.json, spiece.model or merges.txt: give its tokenizer as --tokenizer=KIND:FILE"
  )


def clip() -> Tokenizer:
  """CLIP's tokenizer from an installed package that ships its merges.

  Raises:
    UserError: if there is none.
  """
  for package in _CLIP_PACKAGES:
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / _CLIP_FILE if found and found.origin else None
    if path is not None and path.is_file():
      return tokenizers.load(f"clip:{path}")
  raise UserError(f"CLIP's tokenizer needs its merges: give them as --tokenizer=clip:{_CLIP_FILE}")


def is_clip(tokenizer: Tokenizer) -> bool:
  """Whether it is CLIP's, which open_clip has of its own."""
  return isinstance(tokenizer, ClipTokenizer) and tokenizer.vocab_size == 49408


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """The ids that `config.json` names: what ends a caption, and what fills its row."""
  tokens, mask = tokenizer([""], 8)
  return {"eos_token_id": int(tokens[0][mask[0]][-1]), "pad_token_id": tokenizer.pad_id}


def canonicalises(tokenizer: Tokenizer) -> bool:
  """Whether captions lose their punctuation, which a `tokenizer.json` cannot say."""
  return isinstance(tokenizer, JsonTokenizer) and bool(tokenizer.definition()[3].get("canonical"))


def write(tokenizer: Tokenizer, folder: Path, length: int) -> None:
  """Writes the files from which `transformers` makes the same tokenizer, but for `canonicalises`.

  Args:
    tokenizer: ours.
    folder: exists.
    length: tokens of the longest caption.
  """
  settings: dict[str, Any] = {
    "model_max_length": length,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
  }
  _, _, content, options = tokenizer.definition()
  match tokenizer:
    case SentencePieceTokenizer():
      (folder / "spiece.model").write_bytes(content)
      settings |= {"tokenizer_class": "SiglipTokenizer", "do_lower_case": options["lowercase"]}
    case ClipTokenizer():
      described = tokenizer.model()
      (folder / "vocab.json").write_text(json.dumps(described["vocab"], ensure_ascii=False))
      merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["merges"]]
      (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
      settings |= {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    case JsonTokenizer():
      described = json.loads(content)
      if options.get("lowercase"):
        described["normalizer"] = _lowercased(described.get("normalizer"))
      (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False))
      settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokenizer.pad_token}
      settings["split_special_tokens"] = options["literal"]
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _settings(folder: Path) -> dict[str, Any]:
  settings: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).is_file():
      settings |= json.loads((folder / name).read_text())
  return settings


def _lowercased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
  steps = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
  return {"type": "Sequence", "normalizers": steps}
