"""Reads and writes tokenizers as Hugging Face and open_clip keep them beside their weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import sentencepiece

from contrastive_jax.errors import UserError
from contrastive_jax.interop import checkpoint_files, tokenizer_options
from contrastive_jax.interop.options import check
from contrastive_jax.interop.tokenizer_options import text_of
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import ClipTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer

_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# What CLIP's settings may call its two markers.
_CLIP_TOKENS = {
  "bos_token": ("<|startoftext|>",),
  "eos_token": ("<|endoftext|>",),
  "unk_token": ("<|endoftext|>",),
}
# Packages that ship CLIP's merges.
_CLIP_PACKAGES = ("open_clip", "clip")
# Classes of tokenizers that lower-case what their file leaves as it is; the first also drops punctuation, reads no
# tokenizer.json, and pads with T5's end of text unless it is told otherwise.
_SIGLIP_PAD = "</s>"
_SPACES = (
  "treats spaces otherwise than transformers' SiglipTokenizer, which puts one before every caption and drops repeated"
  " ones whatever its model says"
)
_CANONICAL, _LOWERCASE = ("SiglipTokenizer",), ("SiglipTokenizer", "Siglip2Tokenizer")


def read(folder: Path, *, clean: str = "", mended: bool = False, unnamed: str = "") -> Tokenizer:
  """Reads the tokenizer in a folder of a Hugging Face model.

  Args:
    folder: the folder, which holds `tokenizer.json`, `spiece.model` or `merges.txt`.
    clean: "lower" lower-cases captions whatever the files say, "canonicalize" also drops punctuation.
    mended: captions are mended first, as open_clip does with those of all tokenizers; see `cleaning.mended`.
    unnamed: the class of a tokenizer whose files name none, such as "BertTokenizer" beside a BERT.

  Raises:
    UserError: if there is none, or its files contradict each other.
  """
  settings = _settings(folder)
  source = str(folder)
  kind = tokenizer_options.check_class(settings, source=source) or unnamed
  lowercase = kind in _LOWERCASE and settings.get("do_lower_case", True)
  prepared = {
    "lowercase": clean in ("lower", "canonicalize") or lowercase,
    "canonical": clean == "canonicalize" or kind in _CANONICAL,
    "mended": mended,
  }
  model = folder / "spiece.model"
  if model.is_file() and (kind in _CANONICAL or not (folder / "tokenizer.json").is_file()):
    named = f"read it as the model itself says with --tokenizer=sentencepiece:{model}"
    if kind not in _CANONICAL:
      found = f"tokenizer_class={kind!r}" if kind else "no class"
      # The other classes take nothing but the pieces from it, and build a normalisation of their own.
      raise UserError(
        f"{folder} has a spiece.model without a tokenizer.json, and {found} where SiglipTokenizer alone reads"
        f" such a model: save it again with transformers, or {named}"
      )
    pad = text_of(settings.get("pad_token")) or _SIGLIP_PAD
    pieces = tokenizers.load(f"sentencepiece:{model}", pad=pad, joined=clean != "canonicalize", **prepared)
    _check_pieces(pieces, settings, source)
    if not _spaced_as_siglip(pieces):
      raise UserError(f"{model} {_SPACES}: {named}")
    return _checked(pieces, settings, folder)
  if (folder / "tokenizer.json").is_file():
    path = folder / "tokenizer.json"
    parts = checkpoint_files.read_object(path)
    check(parts, tokenizer_options.JSON_FILE, source=str(path))
    options = {"literal": bool(settings.get("split_special_tokens", False)), "pad": text_of(settings.get("pad_token"))}
    found = tokenizers.load(f"file:{path}", **options, **prepared)
    # What the library has read holds parts of the types that it knows.
    described = tokenizer_options.Described(parts, str(path))
    tokenizer_options.check_settings(settings, described, kind, source=source)
    tokenizer_options.check_steps(kind, described, source=source)
    tokenizer_options.check_numbers(described, found.token_id, source=str(path))
    begins, ends = (None if number is None else found.token_of(number) for number in _around(found))
    tokenizer_options.check_ends(settings, begins, ends, kind, source=source)
    return _checked(found, settings, folder)
  if (folder / "merges.txt").is_file():
    merges = tokenizers.load(f"clip:{folder / 'merges.txt'}", mended=mended)
    _check_merges(merges, settings, folder)
    return _checked(merges, settings, folder)
  raise UserError(
    f"{folder} has no tokenizer.json, spiece.model or merges.txt: give its tokenizer as --tokenizer=KIND:FILE"
  )


def clip(folder: Path | None = None) -> Tokenizer:
  """Reads CLIP's tokenizer, by its merges in a folder or in an installed package.

  Args:
    folder: the folder of the weights; the files that transformers keeps there come first.

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
  """Says whether a tokenizer is CLIP's, which open_clip brings along."""
  return isinstance(tokenizer, ClipTokenizer) and tokenizer.vocab_size == 49408 and not tokenizer.definition()[3]


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """Returns the ids in `config.json` of the beginning of a caption, if there is one, of its end, and of padding.

  Raises:
    UserError: if captions end with no token of their own.
  """
  ids = _ends(tokenizer)
  if not ids:
    raise UserError("the tokenizer ends captions with no token of its own, by which other libraries find their end")
  begins = ids[0] if len(ids) > 1 else None
  return {"bos_token_id": begins, "eos_token_id": ids[-1], "pad_token_id": tokenizer.pad_id}


def canonicalises(tokenizer: Tokenizer) -> bool:
  """Says whether captions lose their punctuation, as `SiglipTokenizer` does; no `tokenizer.json` can say so."""
  return bool(tokenizer.definition()[3].get("canonical"))


def cleaned_otherwise(tokenizer: Tokenizer, library: str) -> list[str]:
  """Names what a library to which a tokenizer is exported mends in captions where we do not, or the other way round.

  Args:
    tokenizer: our tokenizer.
    library: "huggingface" or "open_clip".
  """
  options, there = tokenizer.definition()[3], library == "open_clip"
  here = options.get("mended", isinstance(tokenizer, ClipTokenizer))
  found = ["HTML entities"] if here != there else []
  # open_clip makes a space of them, and SiglipTokenizer drops them.
  if canonicalises(tokenizer) and options.get("joined", False) == there:
    found.append("underscores")
  return found


def write(tokenizer: Tokenizer, folder: Path, length: int) -> None:
  """Writes the files from which `transformers` makes the same tokenizer, but for a `tokenizer.json` that canonicalises.

  Args:
    tokenizer: our tokenizer.
    folder: the folder, which exists.
    length: number of tokens of the longest caption.

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
      if not _spaced_as_siglip(tokenizer):
        raise UserError(f"the run's SentencePiece model {_SPACES}: it cannot be exported")
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


def longest(folder: Path) -> int | None:
  """Returns the number of tokens at which the settings beside a tokenizer cut captions; None where they do not say."""
  limit = _settings(folder).get("model_max_length")
  return None if limit is None else int(limit)


def _settings(folder: Path) -> dict[str, Any]:
  """Reads the settings beside a tokenizer, all of which must be known."""
  settings: dict[str, Any] = {}
  for name, table in (
    ("special_tokens_map.json", tokenizer_options.SPECIAL_TOKENS),
    ("tokenizer_config.json", tokenizer_options.SETTINGS),
  ):
    if (folder / name).is_file():
      given = checkpoint_files.read_json(folder / name)
      check(given, table, source=str(folder / name))
      for token in set(given) & set(settings) & set(tokenizer_options.NAMED):
        if text_of(given[token]) != text_of(settings[token]):
          raise UserError(
            f"{folder} has {token}={text_of(settings[token])!r} in special_tokens_map.json and"
            f" {text_of(given[token])!r} in tokenizer_config.json: save it again with transformers"
          )
      settings |= given
  return settings


def _checked(tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> Tokenizer:
  """Returns the tokenizer if its added tokens and lower case are those that the files beside it ask for."""
  added = folder / "added_tokens.json"
  if added.is_file():
    for token, number in checkpoint_files.read_object(added).items():
      if tokenizer.token_id(token) != number:
        raise UserError(
          f"{added} has {token!r}: {number}, and the tokenizer {tokenizer.token_id(token)}: copy both again"
        )
  asked = settings.get("do_lower_case")
  (upper, lower), _ = tokenizer(["A DOG", "a dog"], 16)
  if asked is not None and asked != bool((upper == lower).all()) and not isinstance(tokenizer, ClipTokenizer):
    raise UserError(
      f"{folder} has do_lower_case={asked} in its tokenizer's settings and a tokenizer that does otherwise: save it"
      " again with transformers"
    )
  if asked is False and isinstance(tokenizer, ClipTokenizer):
    raise UserError(f"{folder} has do_lower_case=False, and CLIP's tokenizer lower-cases captions: remove it")
  return tokenizer


def _check_pieces(tokenizer: SentencePieceTokenizer, settings: dict[str, Any], source: str) -> None:
  """Refuses settings that name other tokens than the SentencePiece model has."""
  own = tokenizer.special_tokens()
  for name, token in tokenizer_options.named_tokens(settings):
    content = text_of(token)
    number = tokenizer.token_id(content)
    odd = number is None or (name in ("eos_token", "unk_token") and content != own[name])
    if odd or (name.startswith("added_tokens_decoder") and number != int(name.partition(".")[2])):
      raise UserError(
        f"{source} has {name}={content!r} in its tokenizer's settings, which its SentencePiece model does not have"
        " there: copy both again"
      )
  for name in ("bos_token", "add_bos_token"):
    if settings.get(name) and name == "add_bos_token":
      raise UserError(
        f"{source} has {name}={settings[name]}, and nothing begins captions of a SentencePiece model here"
      )
  if settings.get("add_eos_token") is False:
    raise UserError(f"{source} has add_eos_token=False, and captions of a SentencePiece model end in a token here")


def _spaced_as_siglip(tokenizer: SentencePieceTokenizer) -> bool:
  """Says whether a SentencePiece model treats spaces as transformers' SiglipTokenizer has it do."""
  pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.definition()[2])
  unknown = tokenizer.special_tokens()["unk_token"]

  def theirs(caption: str) -> list[int]:
    # Behind the unknown token, which is cut off again, a model leaves a space in its place.
    return pieces.encode(f"{unknown}\u2581{caption}")[len(pieces.encode(unknown)) :]

  return all(theirs(caption) == pieces.encode(caption) for caption in ("", "a", " a", "a  a"))


def _check_merges(tokenizer: ClipTokenizer, settings: dict[str, Any], folder: Path) -> None:
  """Refuses a vocabulary or settings that are not those of CLIP's merges."""
  vocab = tokenizer.model()["vocab"]
  path = folder / "vocab.json"
  if path.is_file():
    given = checkpoint_files.read_object(path)
    odd = next((name for name in {**vocab, **given} if given.get(name) != vocab.get(name)), None)
    if odd is not None:
      raise UserError(
        f"{path} is not the vocabulary of the merges.txt beside it, they differ in {odd!r}: copy both again"
      )
  for name, token in tokenizer_options.named_tokens(settings):
    content = text_of(token)
    wrong = name in _CLIP_TOKENS and content not in _CLIP_TOKENS[name]
    wrong |= name.startswith("added_tokens_decoder") and vocab.get(content) != int(name.partition(".")[2])
    if wrong or content not in vocab:
      raise UserError(f"{folder} has {name}={content!r}, which is not CLIP's: copy its tokenizer_config.json again")
  if settings.get("split_special_tokens") or settings.get("add_prefix_space"):
    raise UserError(f"{folder} has split_special_tokens or add_prefix_space, which CLIP's tokenizer does not have")


def _ends(tokenizer: Tokenizer) -> list[int]:
  """Returns the tokens that are put around a caption."""
  tokens, mask = tokenizer([""], 8)
  return tokens[0][mask[0]].tolist()


def _around(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
  """Returns the tokens that are put before and behind a caption."""
  (empty, short), mask = tokenizer(["", "a"], 8)
  ids = short[mask[1]].tolist()
  ends = empty[mask[0]].tolist()
  return (ids[0] if ends and len(ends) > 1 and ids[0] == ends[0] else None), (ends[-1] if ends else None)


def _lowercased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
  steps = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
  return {"type": "Sequence", "normalizers": steps}
