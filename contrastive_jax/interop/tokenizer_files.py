"""Tokenizers as Hugging Face and open_clip keep them beside their weights, read into ours and written back."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop import checkpoint_files
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import ClipTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer

_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# Packages that ship CLIP's merges.
_CLIP_PACKAGES = ("open_clip", "clip")
# Classes of tokenizers that lower-case what their file leaves as it is; the first also drops punctuation, reads no
# tokenizer.json, and pads with T5's end of text unless it is told otherwise.
_SIGLIP_PAD = "</s>"
_CANONICAL, _LOWERCASE = ("SiglipTokenizer",), ("SiglipTokenizer", "Siglip2Tokenizer")


def read(folder: Path, *, clean: str = "") -> Tokenizer:
  """The tokenizer in a folder of a Hugging Face model.

  Args:
    folder: holds `tokenizer.json`, `spiece.model` or `merges.txt`.
    clean: "lower" lower-cases captions whatever the files say, "canonicalize" also drops punctuation.

  Raises:
    UserError: if there is none, or its files contradict each other.
  """
  settings = _settings(folder)
  kind = settings.get("tokenizer_class", "").removesuffix("Fast")
  lowercase = kind in _LOWERCASE and settings.get("do_lower_case", True)
  prepared = {
    "lowercase": clean in ("lower", "canonicalize") or lowercase,
    "canonical": clean == "canonicalize" or kind in _CANONICAL,
  }
  model = folder / "spiece.model"
  if model.is_file() and (kind in _CANONICAL or not (folder / "tokenizer.json").is_file()):
    pad = _token(settings, "pad_token") or (_SIGLIP_PAD if kind in _CANONICAL else "")
    return tokenizers.load(f"sentencepiece:{model}", pad=pad, **prepared)
  if (folder / "tokenizer.json").is_file():
    options = {"literal": bool(settings.get("split_special_tokens", False)), "pad": _token(settings, "pad_token")}
    found = tokenizers.load(f"file:{folder / 'tokenizer.json'}", **options, **prepared)
    _require_ends(found, settings, folder)
    return found
  if (folder / "merges.txt").is_file():
    return tokenizers.load(f"clip:{folder / 'merges.txt'}")
  raise UserError(
    f"{folder} has no tokenizer.json, spiece.model or merges.txt: give its tokenizer as --tokenizer=KIND:FILE"
  )


def clip(folder: Path | None = None) -> Tokenizer:
  """CLIP's tokenizer, by its merges in a folder or in an installed package.

  Args:
    folder: of the weights; what transformers keeps there comes first.

  Raises:
    UserError: if there are none.
  """
  if folder is not None and (folder / "merges.txt").is_file():
    return tokenizers.load(f"clip:{folder / 'merges.txt'}")
  for package in _CLIP_PACKAGES:
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / _CLIP_FILE if found and found.origin else None
    if path is not None and path.is_file():
      return tokenizers.load(f"clip:{path}")
  raise UserError(f"CLIP's tokenizer needs its merges: give them as --tokenizer=clip:{_CLIP_FILE}")


def is_clip(tokenizer: Tokenizer) -> bool:
  """Whether it is CLIP's, which open_clip has of its own."""
  return isinstance(tokenizer, ClipTokenizer) and tokenizer.vocab_size == 49408


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """The ids that `config.json` names: what begins a caption, if anything does, what ends it, and what fills its row.

  Raises:
    UserError: if captions end with no token of their own.
  """
  ids = _ends(tokenizer)
  if not ids:
    raise UserError("the tokenizer ends captions with no token of its own, by which other libraries find their end")
  begins = ids[0] if len(ids) > 1 else None
  return {"bos_token_id": begins, "eos_token_id": ids[-1], "pad_token_id": tokenizer.pad_id}


def canonicalises(tokenizer: Tokenizer) -> bool:
  """Whether captions lose their punctuation, which a `tokenizer.json` cannot say and `SiglipTokenizer` always does."""
  return bool(tokenizer.definition()[3].get("canonical"))


def write(tokenizer: Tokenizer, folder: Path, length: int) -> None:
  """Writes the files from which `transformers` makes the same tokenizer, but for a `tokenizer.json` that canonicalises.

  Args:
    tokenizer: ours.
    folder: exists.
    length: tokens of the longest caption.

  Raises:
    UserError: if `transformers` has no tokenizer of this kind.
  """
  if isinstance(tokenizer, SentencePieceTokenizer) and not canonicalises(tokenizer):
    raise UserError(
      "transformers takes a SentencePiece model for SigLIP's tokenizer, which drops punctuation, and this one keeps it:"
      " only a tokenizer.json can be exported so"
    )
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
      settings |= tokenizer.special_tokens()
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
      settings |= checkpoint_files.read_json(folder / name)
  return settings


def _token(settings: dict[str, Any], name: str) -> str:
  token = settings.get(name) or ""
  return token["content"] if isinstance(token, dict) else token


def _ends(tokenizer: Tokenizer) -> list[int]:
  """What is put around a caption."""
  tokens, mask = tokenizer([""], 8)
  return tokens[0][mask[0]].tolist()


def _require_ends(tokenizer: JsonTokenizer, settings: dict[str, Any], folder: Path) -> None:
  # Classes such as Gemma's put these two by their settings, whatever `tokenizer.json` says.
  ids = _ends(tokenizer)
  for name, place in (("bos", slice(0, 1)), ("eos", slice(-1, None))):
    asked = settings.get(f"add_{name}_token")
    has = ids[place] == [tokenizer.token_id(_token(settings, f"{name}_token"))]
    if asked is not None and asked != has:
      raise UserError(
        f"{folder} has add_{name}_token={asked} in tokenizer_config.json and a tokenizer.json that does otherwise: save"
        " it again with transformers"
      )


def _lowercased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
  steps = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
  return {"type": "Sequence", "normalizers": steps}
