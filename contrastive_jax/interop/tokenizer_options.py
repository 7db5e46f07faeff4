"""All options of the files beside a tokenizer of `transformers`, and what the importer does with each.

They follow `PreTrainedTokenizerBase` and the classes of CLIP, SigLIP, Gemma, BERT and their relatives. `check_settings`
compares what the files say with what the tokenizer does: two files that contradict each other are refused, since
libraries differ in which of them they believe.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from contrastive_jax.errors import UserError
from contrastive_jax.interop.options import (
  ANY,
  FLAG,
  LIST,
  OBJECT,
  POSITIVE,
  RECORD,
  TEXT,
  Honoured,
  Ignored,
  Kind,
  Required,
  Table,
  check_choice,
  optional,
)

_DECODING = Ignored("it says how tokens become text")
_CALL = Ignored("each call gives its own")
_TOKEN = Honoured(
  optional(Kind("a token", lambda value: (isinstance(value, str) and value != "") or _is_token(value))),
  "must be a token of the tokenizer",
)
# Classes whose captions a tokenizer.json, a SentencePiece model or CLIP's merges describe whole. Those of decoders are
# none of them: from transformers 5 on GPT-2's, for one, reads vocabulary and merges alone and drops the other steps.
CLASSES = (
  *("CLIPTokenizer", "SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer", "BertTokenizer", "T5Tokenizer"),
  *("PreTrainedTokenizer", "TokenizersBackend", "DistilBertTokenizer", "MPNetTokenizer", "RobertaTokenizer"),
  *("XLMRobertaTokenizer", "AlbertTokenizer", "ElectraTokenizer"),
)
_TOKENS = Kind("a whole number from 1 on", lambda value: POSITIVE.holds(value) and value == int(value))
# What begins a caption, and what ends it.
_BEGINNINGS, _ENDS = ("bos_token", "cls_token"), ("eos_token", "sep_token")
NAMED = (*_BEGINNINGS, *_ENDS, "pad_token", "mask_token", "unk_token")
SPECIAL_TOKENS: Table = {
  **dict.fromkeys(NAMED, _TOKEN),
  "additional_special_tokens": Honoured(optional(LIST), "must be tokens of the tokenizer"),
}
SETTINGS: Table = {
  **SPECIAL_TOKENS,
  "extra_special_tokens": Honoured(
    optional(Kind("a list or an object", lambda value: isinstance(value, list | dict))),
    "must be tokens of the tokenizer",
  ),
  "model_specific_special_tokens": Honoured(optional(OBJECT), "must be tokens of the tokenizer"),
  "added_tokens_decoder": Honoured(optional(OBJECT), "must be tokens of the tokenizer"),
  "tokenizer_class": Honoured(optional(TEXT), "how captions are lower-cased and padded"),
  "model_max_length": Honoured(optional(_TOKENS), "text.length"),
  "add_bos_token": Honoured(optional(FLAG), "must be what the tokenizer does"),
  "add_eos_token": Honoured(optional(FLAG), "must be what the tokenizer does"),
  "add_prefix_space": Honoured(optional(FLAG), "must be what the tokenizer does"),
  "do_lower_case": Honoured(optional(FLAG), "must be what the tokenizer does, but for SigLIP's, which follow it"),
  "strip_accents": Honoured(optional(FLAG), "must be what the tokenizer does"),
  "tokenize_chinese_chars": Honoured(optional(FLAG), "must be what the tokenizer does"),
  "split_special_tokens": Honoured(optional(FLAG), "whether special tokens spelled in a caption are text"),
  "padding_side": Required(("right",), "which pads captions at their beginning"),
  "truncation_side": Required(("right",), "which cuts captions at their beginning"),
  "do_basic_tokenize": Required((True, None), "which leaves out a step"),
  "never_split": Required((None,), "which keeps words whole"),
  "do_split_on_punc": Required((True, None), "which keeps punctuation with its word"),
  "sp_model_kwargs": Required((None,), "which changes how SentencePiece splits words"),
  "auto_map": Required((None,), "which asks for code of the model's own"),
  "fix_mistral_regex": Required((False, None), "which changes how words are split"),
  "keep_accents": Honoured(optional(ANY), "must be what the tokenizer does"),
  "legacy": Ignored("only text behind a special token spelled in a caption is split otherwise"),
  "trim_offsets": Ignored("it says which characters a token covers"),
  "use_fast": Ignored("both implementations give the same tokens"),
  "model_input_names": Ignored("the model takes what it reads"),
  "extra_ids": Ignored("tokens that no caption holds"),
  "pad_token_type_id": Ignored("captions have one kind of tokens"),
  "token_type_ids_pattern": Ignored("captions have one kind of tokens"),
  "clean_text": Required((True, None), "which keeps control characters"),
  **dict.fromkeys(("clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors"), _DECODING),
  **dict.fromkeys(
    ("max_length", "stride", "truncation_strategy", "truncation", "padding", "pad_to_multiple_of"), _CALL
  ),
  **dict.fromkeys(
    ("chat_template", "use_default_system_prompt", "response_schema"), Ignored("captions are no dialogue")
  ),
  **dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"), RECORD),
  **dict.fromkeys(("processor_class", "backend", "from_slow", "is_local", "local_files_only"), RECORD),
  **dict.fromkeys(("transformers_version", "_commit_hash", "_from_auto", "verbose"), RECORD),
}
# The parts of a tokenizer.json, all of which the tokenizers library reads.
JSON_FILE: Table = {
  "version": RECORD,
  "truncation": Honoured(optional(OBJECT), "its side; a call says where"),
  "padding": Honoured(optional(OBJECT), "its side and token; a call says how far"),
  "added_tokens": Honoured(optional(LIST), "as the tokenizers library reads them"),
  "model": Honoured(OBJECT, "as the tokenizers library reads it"),
  **dict.fromkeys(
    ("normalizer", "pre_tokenizer", "post_processor"), Honoured(optional(OBJECT), "as the tokenizers library reads it")
  ),
  "decoder": _DECODING,
}
# Settings that a class writes into a step of the tokenizer.json: (setting, type of the step, its option).
_STEPS = (
  ("do_lower_case", "BertNormalizer", "lowercase"),
  ("strip_accents", "BertNormalizer", "strip_accents"),
  ("tokenize_chinese_chars", "BertNormalizer", "handle_chinese_chars"),
  ("clean_text", "BertNormalizer", "clean_text"),
  ("add_prefix_space", "ByteLevel", "add_prefix_space"),
)
# Classes that prepare captions by their own settings, whatever the tokenizer.json beside these says, and what the
# settings are that no file gives.
_BERTS = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BERT_DEFAULTS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True, "clean_text": True}
_CLASS_DEFAULTS: dict[str, dict[str, bool | None]] = {
  **dict.fromkeys(_BERTS, _BERT_DEFAULTS),
  "RobertaTokenizer": {"add_prefix_space": False},
}
_BERT_STEPS = (
  (("BertNormalizer",),),
  (("BertPreTokenizer",),),
  {"max_input_chars_per_word": (100, None), "continuing_subword_prefix": ("##", None)},
)
# Versions of transformers wrote different ones of these for the same SentencePiece model.
_SENTENCEPIECE = tuple(
  types for count in range(4) for types in itertools.combinations(("Precompiled", "Strip", "Replace"), count)
)
_METASPACE = (("Metaspace",), ("WhitespaceSplit", "Metaspace"))
_GEMMA_STEPS = ((("Replace",), ("Lowercase", "Replace")), ((), ("Split",)), {"byte_fallback": (True,)})
# Classes that from transformers 5 on build these steps anew of the vocabulary alone: (types of the normalizer's, of the
# pre_tokenizer's, options of the model). Before, the file was believed, so that another one has no one meaning.
_CLASS_STEPS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...], dict[str, tuple]]] = {
  "CLIPTokenizer": (
    (("NFC", "Replace", "Lowercase"),),
    (("Split", "ByteLevel"),),
    {"continuing_subword_prefix": ("", None), "end_of_word_suffix": ("</w>",), "ignore_merges": (False, None)},
  ),
  **dict.fromkeys((*_BERTS, "MPNetTokenizer"), _BERT_STEPS),
  "RobertaTokenizer": (((),), (("ByteLevel",),), {}),
  **dict.fromkeys(("T5Tokenizer", "XLMRobertaTokenizer"), (_SENTENCEPIECE, _METASPACE, {})),
  **dict.fromkeys(("GemmaTokenizer", "Siglip2Tokenizer"), _GEMMA_STEPS),
}
# Classes that put a token before and behind every caption.
_ENCLOSING = (
  *("CLIPTokenizer", *_BERTS, "MPNetTokenizer", "RobertaTokenizer", "XLMRobertaTokenizer", "AlbertTokenizer"),
)
# Classes that pad captions at their beginning where no file says otherwise.
_PADS_LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")
# Flags of a token that change what it matches in a caption.
_FLAGS = ("lstrip", "rstrip", "single_word")


class Described:
  """The contents of a `tokenizer.json`, for comparison with the files beside it."""

  def __init__(self, described: Mapping[str, Any], source: str):
    """Reads the parts of the file.

    Args:
      described: the content of the file, which the tokenizers library can read.
      source: where it comes from, for errors.

    Raises:
      UserError: for a setting that cannot be honoured.
    """
    self.added = {token.get("content"): token for token in described.get("added_tokens") or []}
    self.model = described["model"]
    if self.model.get("dropout"):
      raise UserError(
        f"{source} has model.dropout={self.model['dropout']}, which splits words at random: set it to null"
      )
    self.sides = {
      f"{part}.direction": str((described.get(part) or {}).get("direction", "Right"))
      for part in ("truncation", "padding")
    }
    self.pads = described.get("padding") is not None
    self.steps = {name: [*_parts(described.get(name))] for name in ("normalizer", "pre_tokenizer")}
    self.parts = [part for parts in self.steps.values() for part in parts]

  def option(self, kind: str, name: str) -> tuple[bool, Any]:
    """Says whether a step of this type has an option, and returns its value."""
    found = [part[name] for part in self.parts if part.get("type") == kind and name in part]
    return bool(found), (found[0] if found else None)


def check_numbers(described: Described, number_of: Callable[[str], int | None], *, source: str) -> None:
  """Refuses a file whose added tokens have other numbers than the tokenizers library gives them.

  Args:
    described: the `tokenizer.json`.
    number_of: returns the number of a token in the tokenizer that was made of the file.
    source: the file, for errors.

  Raises:
    UserError: naming the token and both numbers.
  """
  for content, token in described.added.items():
    if number_of(content) != token.get("id"):
      raise UserError(
        f"{source} gives the added token {content!r} the number {token.get('id')}, and the tokenizers library"
        f" {number_of(content)}: copy it again"
      )


def check_steps(kind: str, described: Described, *, source: str) -> None:
  """Refuses a `tokenizer.json` with other steps than those that its class builds.

  Args:
    kind: the class, as `check_class` returns it.
    described: the `tokenizer.json`.
    source: the folder, for errors.

  Raises:
    UserError: naming the step.
  """
  if kind not in _CLASS_STEPS:
    return
  advice = (
    f"transformers reads otherwise in its versions 4 and 5 for tokenizer_class='{kind}': write tokenizer_class="
    "'PreTrainedTokenizerFast' if the file is right"
  )
  normalizers, pre_tokenizers, options = _CLASS_STEPS[kind]
  for name, known in (("normalizer", normalizers), ("pre_tokenizer", pre_tokenizers)):
    types = tuple(str(part.get("type")) for part in described.steps[name] if part.get("type") != "Sequence")
    if types not in known:
      raise UserError(f"{source} has a tokenizer.json whose {name} is {', '.join(types) or None}, which {advice}")
  for name, values in options.items():
    if described.model.get(name) not in values:
      raise UserError(f"{source} has a tokenizer.json with model.{name}={described.model.get(name)!r}, which {advice}")


def check_settings(settings: Mapping[str, Any], described: Described, kind: str = "", *, source: str) -> None:
  """Refuses settings that say something else than the `tokenizer.json` beside them does.

  Args:
    settings: the settings of `tokenizer_config.json`, with those of `special_tokens_map.json`.
    described: the `tokenizer.json`.
    kind: the class of the tokenizer, as `check_class` returns it.
    source: the folder of both, for errors.

  Raises:
    UserError: naming the option and its value.
  """
  for name, side in described.sides.items():
    if side != "Right" and settings.get(f"{name.partition('.')[0]}_side") != "right":
      raise UserError(f"{source} has {name}={side!r} in its tokenizer.json: only 'Right' can be imported")
  if kind in _PADS_LEFT and not described.pads and "padding_side" not in settings:
    raise UserError(
      f"{source} does not say where captions are padded, and tokenizer_class='{kind}' pads them at their beginning:"
      " write padding_side='right' into its tokenizer_config.json if the model was trained so"
    )
  for name, token in named_tokens(settings):
    content = text_of(token)
    own = described.added.get(content)
    if own is None:
      raise _conflict(source, name, content, "whose tokenizer.json has no such added token")
    if isinstance(token, Mapping):
      kept = name.startswith("added_tokens_decoder")
      flags = (*_FLAGS, *(("special",) if kept else ()), *(() if own.get("special") else ("normalized",)))
      odd = [flag for flag in flags if flag in token and token[flag] != own.get(flag, False)]
      if odd or (kept and own.get("id") != int(name.partition(".")[2])):
        what = f"{odd[0]}={own.get(odd[0])}" if odd else f"the number {own.get('id')}"
        raise _conflict(source, name, token, f"whose tokenizer.json gives the token {what}")
  unknown = described.model.get("unk_token")
  if settings.get("unk_token") and unknown and text_of(settings["unk_token"]) != unknown:
    raise _conflict(source, "unk_token", text_of(settings["unk_token"]), f"whose tokenizer.json has {unknown!r}")
  for name, step, option in _STEPS:
    there, value = described.option(step, option)
    asked = settings.get(name)
    if name in _CLASS_DEFAULTS.get(kind, {}) and name not in settings:
      asked = _CLASS_DEFAULTS[kind][name]
      _, lowercase = described.option("BertNormalizer", "lowercase")
      if there and value != asked and (name != "strip_accents" or value != lowercase):
        raise UserError(
          f"{source} has {option}={value} in its tokenizer.json, and tokenizer_class='{kind}' has {name}={asked} where"
          f" tokenizer_config.json does not say: write {name} there"
        )
    # Null means something to `strip_accents` alone: accents go where captions are lower-cased.
    if name not in settings or (asked is None and (name != "strip_accents" or not there)):
      continue
    if there and asked != value:
      raise _conflict(source, name, asked, f"whose tokenizer.json has {option}={value}")
    if not there and asked and name not in ("do_lower_case", "add_prefix_space"):
      raise _conflict(source, name, asked, f"whose tokenizer.json has no {step}")
  if settings.get("keep_accents") is not None:
    raise _conflict(source, "keep_accents", settings["keep_accents"], "which its tokenizer.json cannot say")


def check_ends(
  settings: Mapping[str, Any], begins: str | None, ends: str | None, kind: str = "", *, source: str
) -> None:
  """Refuses settings that name other tokens for the beginning and the end of captions than the tokenizer puts there.

  Args:
    settings: as `check_settings` takes them.
    begins: the token that the tokenizer puts before a caption, if it puts one.
    ends: the token that it puts behind a caption, if it puts one.
    kind: the class of the tokenizer, as `check_class` returns it.
    source: the folder, for errors.

  Raises:
    UserError: naming the option and its value.
  """
  if (kind in _ENCLOSING and begins is None) or (kind in (*_ENCLOSING, "T5Tokenizer") and ends is None):
    where = "before" if begins is None and kind in _ENCLOSING else "behind"
    raise UserError(
      f"{source} has a tokenizer.json that puts no token {where} a caption, and tokenizer_class='{kind}' puts one:"
      " copy both files again"
    )
  for names, token, flag in ((_BEGINNINGS, begins, "add_bos_token"), (_ENDS, ends, "add_eos_token")):
    said = {name: text_of(settings[name]) for name in names if settings.get(name)}
    asked = settings.get(flag)
    if asked is not None and asked != (token is not None and token == said.get(names[0])):
      raise UserError(
        f"{source} has {flag}={asked} in tokenizer_config.json and a tokenizer.json that does otherwise: save it again"
        " with transformers"
      )
    if token is not None and said and token not in said.values():
      name = next(iter(said))
      raise _conflict(source, name, said[name], f"whose tokenizer puts {token!r} there")


def check_class(settings: Mapping[str, Any], *, source: str) -> str:
  """Returns the class of a tokenizer without the suffix of its implementation; "" where none is named."""
  kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
  if kind:
    check_choice("tokenizer_class", kind, CLASSES, source=source)
  return kind


def named_tokens(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """Lists all tokens that settings name, with the options that name them."""
  for name in NAMED:
    if settings.get(name):
      yield name, settings[name]
  for name in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
    tokens = settings.get(name) or []
    for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
      if not isinstance(token, str) and not _is_token(token):
        raise UserError(f"{name} holds {token!r}, which is not a token")
      yield name, token
  for number, token in (settings.get("added_tokens_decoder") or {}).items():
    if not number.isdecimal() or not _is_token(token):
      raise UserError(f"added_tokens_decoder holds {number!r}: {token!r}, which is not a token and its number")
    yield f"added_tokens_decoder.{number}", token


def text_of(token: Any) -> str:
  """Returns the text of a token, which files give alone or with its flags."""
  return token["content"] if isinstance(token, Mapping) else token or ""


def _is_token(value: Any) -> bool:
  return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _parts(step: Any) -> Iterator[Mapping[str, Any]]:
  """Yields a step of a tokenizer and the steps that it is made of."""
  if isinstance(step, Mapping):
    yield step
    for name in ("normalizers", "pretokenizers"):
      for part in step.get(name) or []:
        yield from _parts(part)


def _conflict(source: str, name: str, value: Any, why: str) -> UserError:
  return UserError(f"{source} has {name}={value!r} in its tokenizer's settings, {why}: save it again with transformers")
