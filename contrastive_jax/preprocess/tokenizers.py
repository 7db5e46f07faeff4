"""Tokenizers: a BPE trained on the run's captions, `tokenizer.json`, SentencePiece, and CLIP's BPE."""

import abc
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from contrastive_jax import downloads
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess import panics
from contrastive_jax.preprocess.cleaning import STRAIGHT_QUOTES, Cleaning, lowered

PAD, EOS = "<pad>", "<eos>"
_KIND_FILE = "tokenizer_kind.json"
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@runtime_checkable
class CaptionEncoder(Protocol):
  """What encodes captions, with a name for all that decides how."""

  fingerprint: str

  def __call__(
    self, texts: Sequence[str], length: int
  ) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]: ...


class Tokenizer(abc.ABC):
  """Encodes captions to a fixed length. Instances can be pickled and used from several threads.

  Attributes:
    vocab_size: the number of ids.
    pad_id: the id that fills a caption up to its length.
    fingerprint: SHA-256 of the tokenizer's definition; a checkpoint keeps it.
    special_count: the number of tokens that every caption gets beside its own.
  """

  vocab_size: int
  pad_id: int
  fingerprint: str
  special_count: int = 0

  def __call__(
    self, texts: Sequence[str], length: int
  ) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]:
    """Encodes, truncates and pads.

    Args:
      texts: the captions.
      length: number of tokens of each row. A caption that is longer loses its end, but keeps its end-of-text token.

    Returns:
      int32 ids and the mask of those that are not padding.

    Raises:
      UserError: if the length leaves no room for a token of the caption itself.
    """
    if isinstance(texts, str):
      raise ValueError("texts is a sequence of captions, got one string")
    check_length(self, length)
    tokens = np.full((len(texts), length), self.pad_id, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, ids in enumerate(self._encode(list(texts), length)):
      tokens[row, : len(ids)] = ids
      mask[row, : len(ids)] = True
    return tokens, mask

  def save(self, directory: str | os.PathLike) -> None:
    """Writes what `load` needs to rebuild this tokenizer."""
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    kind, name, content, options = self.definition()
    (folder / name).write_bytes(content)
    (folder / _KIND_FILE).write_text(json.dumps({"kind": kind, "file": name, "options": options}) + "\n")

  @abc.abstractmethod
  def token_id(self, token: str) -> int | None:
    """Returns the number of a token, special or not; None where there is none."""

  @abc.abstractmethod
  def token_of(self, number: int) -> str:
    """Returns the token of a number."""

  @abc.abstractmethod
  def spelled(self, numbers: Sequence[int]) -> str:
    """Returns the text that tokens spell; special tokens spell nothing, and parts of a character U+FFFD."""

  @abc.abstractmethod
  def _encode(self, texts: list[str], length: int) -> Iterable[list[int]]:
    """Ids of each text with special tokens, at most `length`."""

  @abc.abstractmethod
  def definition(self) -> tuple[str, str, bytes, dict[str, Any]]:
    """Returns the kind, file name and content of the file, and options for the constructor."""

  def __reduce__(self) -> tuple:
    kind, _, content, options = self.definition()
    return functools.partial(KINDS[kind], content, **options), ()

  def _fingerprint(self) -> str:
    kind, _, content, options = self.definition()
    return hashlib.sha256(json.dumps([kind, options], sort_keys=True).encode() + b"\0" + content).hexdigest()


class JsonTokenizer(Tokenizer):
  """The tokenizer that a Hugging Face `tokenizer.json` defines, special tokens included."""

  def __init__(
    self,
    content: bytes,
    literal: bool = False,
    lowercase: bool = False,
    canonical: bool = False,
    pad: str = "",
    mended: bool = False,
  ):
    """Reads the file.

    Args:
      content: of the file.
      literal: special tokens that are spelled out in a caption are plain text.
      lowercase: captions are lower-cased, beside what the file says, as by a step of the file: special tokens that are
        spelled in capitals are plain text.
      canonical: and lose their punctuation, see `cleaning.canonical`.
      pad: the token for padding; empty takes what the file or custom calls so.
      mended: captions are mended, and lower-cased as whole texts, as open_clip does before any of its tokenizers; see
        `cleaning.mended`.
    """
    self._content, self._literal = content, literal
    self._options = {"lowercase": lowercase, "canonical": canonical, "pad": pad, "mended": mended}
    self._clean = Cleaning(mended, lowercase and mended, canonical)
    self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
    self._tokenizer.encode_special_tokens = literal
    if lowercase and not mended:
      steps = [self._tokenizer.normalizer] if self._tokenizer.normalizer else []
      self._tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    padding = self._tokenizer.padding
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    if pad and self._tokenizer.token_to_id(pad) is None:
      raise UserError(f"the tokenizer.json has no token '{pad}' for padding: name one that it has")
    candidates = pad, (padding or {}).get("pad_token"), PAD, "[PAD]", "<|pad|>"
    ids = (self._tokenizer.token_to_id(token) for token in candidates if token)
    self.pad_id = next((i for i in ids if i is not None), 0)
    self.pad_token = self._tokenizer.id_to_token(self.pad_id)
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    self.special_count = self._tokenizer.num_special_tokens_to_add(is_pair=False)
    self._check()
    self.fingerprint = self._fingerprint()

  def _check(self) -> None:
    """Refuses a file that makes tokens of captions which no table of embeddings has, or that repeats or drops them."""
    captions = ("", "A dog, 7 \N{FOX FACE}!")
    post_processor, self._tokenizer.post_processor = self._tokenizer.post_processor, None
    plain = [self._tokenizer.encode(caption) for caption in captions]
    self._tokenizer.post_processor = post_processor
    for encoding in plain:
      ids = self._tokenizer.post_process(encoding).ids
      if len(ids) != len(encoding.ids) + self.special_count:
        raise UserError(
          f"the post_processor of the tokenizer.json makes {len(ids)} tokens of a caption of {len(encoding.ids)}: it"
          " must hold the caption once, beside its special tokens"
        )
      for number in ids:
        if number >= self.vocab_size:
          raise UserError(
            f"the tokenizer.json makes token {number} of captions, and its vocabulary has {self.vocab_size}"
          )

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def token_of(self, number: int) -> str:
    return self._tokenizer.id_to_token(number)

  def spelled(self, numbers: Sequence[int]) -> str:
    return self._tokenizer.decode(list(numbers), skip_special_tokens=True)

  def _encode(self, texts: list[str], length: int) -> Iterable[list[int]]:
    for encoding in self._tokenizer.encode_batch([self._clean(text) for text in texts], add_special_tokens=False):
      encoding.truncate(length - self.special_count)
      yield self._tokenizer.post_process(encoding).ids

  def definition(self) -> tuple[str, str, bytes, dict[str, Any]]:
    # What is off stays out, so that tokenizers keep their fingerprint when options come to be.
    extra = {name: value for name, value in self._options.items() if value}
    return "file", "tokenizer.json", self._content, {"literal": self._literal, **extra}


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece `.model`, with its end-of-text token appended, which is never cut off.

  Follows SigLIP's tokenisation (big_vision, `eos="sticky", pad_value=1`). SigLIP's captions are lower-cased, and padded
  with the end of text although its model, T5's, has a token for padding.
  """

  special_count = 1

  def __init__(
    self,
    content: bytes,
    lowercase: bool = False,
    canonical: bool = False,
    pad: str = "",
    mended: bool = False,
    joined: bool = False,
  ):
    """Reads the file.

    Args:
      content: of the file.
      lowercase: captions are lower-cased.
      canonical: and lose their punctuation, see `cleaning.canonical`.
      pad: the token for padding; empty takes the model's own or, where it has none, the end of text.
      mended: captions are mended, see `cleaning.mended`.
      joined: an underscore joins the words beside it where captions lose their punctuation, see `cleaning.canonical`.

    Raises:
      UserError: if the model has no end of text or not this token.
    """
    self._content, self._pad = content, pad
    self._clean = Cleaning(mended, lowercase, canonical, joined)
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    self._eos = self._processor.eos_id()
    if self._eos < 0:
      raise UserError("the SentencePiece model has no end-of-text token, train it with an eos_id")
    self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self._eos
    if pad:
      self.pad_id = self._processor.piece_to_id(pad)
      if self._processor.id_to_piece(self.pad_id) != pad:
        raise UserError(f"the SentencePiece model has no token '{pad}' for padding: name one that it has")
    self.vocab_size = self._processor.vocab_size()
    self.fingerprint = self._fingerprint()

  def _encode(self, texts: list[str], length: int) -> Iterable[list[int]]:
    for ids in self._processor.encode([self._clean(text) for text in texts], out_type=int):
      yield [*ids[: length - 1], self._eos]

  def definition(self) -> tuple[str, str, bytes, dict[str, Any]]:
    options = {**dataclasses.asdict(self._clean), "pad": self._pad}
    lowercase = options.pop("lowercase")
    extra = {name: value for name, value in options.items() if value}
    return "sentencepiece", "sentencepiece.model", self._content, {"lowercase": lowercase, **extra}

  def token_id(self, token: str) -> int | None:
    number = self._processor.piece_to_id(token)
    return number if self._processor.id_to_piece(number) == token else None

  def token_of(self, number: int) -> str:
    return self._processor.id_to_piece(number)

  def spelled(self, numbers: Sequence[int]) -> str:
    return self._processor.decode(list(numbers))

  def special_tokens(self) -> dict[str, str]:
    """Returns the tokens for padding, the end of text and what is unknown, as `transformers` calls them."""
    ids = {"pad_token": self.pad_id, "eos_token": self._eos, "unk_token": self._processor.unk_id()}
    return {name: self._processor.id_to_piece(number) for name, number in ids.items()}


class ClipTokenizer(Tokenizer):
  """OpenAI CLIP's lower-cased BPE from its merges file, with start and end tokens and padding by zeros.

  Follows `simple_tokenizer.py` of openai/CLIP, except that of ftfy's repairs only straight quotes, ligatures,
  full-width characters and Unicode's NFC are kept: text that was decoded with a wrong encoding stays as it is.
  """

  special_count = 2

  def __init__(self, content: bytes, mended: bool = True):
    """Reads the file.

    Args:
      content: of the file.
      mended: captions are mended as in the original, see `cleaning.mended`; transformers hands them on as they are.
    """
    self._content, self._mended = content, mended
    self._clean = Cleaning(mended=True, lowercase=True) if mended else lowered
    lines = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _CLIP_MERGES + 1] if line.strip()]
    if any(len(pair) != 2 for pair in merges):
      raise UserError("the CLIP vocabulary file does not hold one pair of symbols a line")
    alphabet = list(_byte_symbols().values())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *(a + b for a, b in merges)]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    self._start, self._end = len(symbols), len(symbols) + 1
    self.vocab_size, self.pad_id = len(symbols) + 2, 0
    model = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    self._tokenizer = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_PATTERN), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    self._tokenizer.normalizer = normalizers.NFC()
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    self._tokenizer.decoder = decoders.ByteLevel()
    # As in the original, the two markers are recognised in captions too.
    self._tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    self.fingerprint = self._fingerprint()

  def _encode(self, texts: list[str], length: int) -> Iterable[list[int]]:
    for encoding in self._tokenizer.encode_batch([self._clean(text) for text in texts], add_special_tokens=False):
      yield [self._start, *encoding.ids[: length - 2], self._end]

  def definition(self) -> tuple[str, str, bytes, dict[str, Any]]:
    return "clip", "clip_vocabulary.txt.gz", self._content, {} if self._mended else {"mended": False}

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def token_of(self, number: int) -> str:
    return self._tokenizer.id_to_token(number)

  def spelled(self, numbers: Sequence[int]) -> str:
    # What ends a word stands for the blank behind it.
    return self._tokenizer.decode(list(numbers), skip_special_tokens=True).replace("</w>", " ")

  def model(self) -> dict[str, Any]:
    """Returns the tokenizer's "vocab", symbol to id, and its "merges", pairs of symbols."""
    return json.loads(self._tokenizer.to_str())["model"]


# What a specification such as "clip:FILE" builds from the file.
KINDS: dict[str, Callable[..., Tokenizer]] = {
  "file": JsonTokenizer,
  "sentencepiece": SentencePieceTokenizer,
  "clip": ClipTokenizer,
}


def train_bpe(
  captions: Iterable[str], vocab_size: int, lowercase: bool = True, straight_quotes: bool = False
) -> JsonTokenizer:
  """Trains a byte-level BPE: no caption in any script has unknown tokens.

  Args:
    captions: the captions that it is trained on.
    vocab_size: the most ids; the 256 bytes, padding (0) and end of text (1) are among them.
    lowercase: whether upper and lower case are the same.
    straight_quotes: whether curly and straight quotes are the same.

  Raises:
    UserError: if the bytes alone need more ids.
  """
  if vocab_size < 258:
    raise UserError(f"model.text.vocab_size={vocab_size} must be at least 258 for a byte-level BPE: raise it")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
  if straight_quotes:
    steps += [normalizers.Replace(chr(code), quote) for code, quote in STRAIGHT_QUOTES.items()]
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, EOS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(captions, trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
  )
  return JsonTokenizer(tokenizer.to_str().encode(), literal=True)


def load(spec: str | os.PathLike, **options: Any) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    spec: "file:tokenizer.json", "sentencepiece:FILE.model", "clip:bpe_simple_vocab_16e6.txt.gz", or a directory that
      `Tokenizer.save` wrote. A `Path` is such a directory in any case. A FILE may be an address, such
      as s3://bucket/FILE.
    **options: for the kind's constructor, such as `lowercase=True` for SentencePiece.

  Raises:
    UserError: if the kind is unknown, or the file is missing or unreadable.
  """
  text = os.fspath(spec)
  if os.path.isdir(text):
    described = pathlib.Path(text) / _KIND_FILE
    if not described.is_file():
      raise UserError(f"tokenizer directory {text} has no {_KIND_FILE}, it was not written by a run")
    try:
      fields = json.loads(described.read_text())
      kind, path, options = fields["kind"], pathlib.Path(text) / fields["file"], fields["options"] | options
      KINDS[kind]
    except (ValueError, LookupError, TypeError) as error:
      raise UserError(f"{described} is damaged ({' '.join(str(error).split())[:80]}); put back the original") from None
  elif not isinstance(spec, str):
    raise UserError(f"{text} is missing, the tokenizer of the run: put back the original folder")
  else:
    kind, colon, name = text.partition(":")
    if not colon or kind not in KINDS:
      known = ", ".join(f"{k}:FILE" for k in KINDS)
      raise UserError(f"tokenizer.spec={text!r}{nearest(kind, KINDS)} must be {known} or a directory")
    path = downloads.file("tokenizer.spec", name)
  if not path.is_file():
    raise UserError(f"tokenizer file {path} does not exist: name one that does")
  try:
    with panics.as_errors():
      return KINDS[kind](path.read_bytes(), **options)
  except UserError:
    raise
  except Exception as error:
    raise UserError(
      f"tokenizer file {path} cannot be read as {kind} ({(str(error) or type(error).__name__).splitlines()[0]})"
    ) from error


@functools.cache
def _byte_symbols() -> dict[int, str]:
  """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest follows from U+0100 on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  spare = itertools.count(256)
  rest = {byte: chr(next(spare)) for byte in range(256) if byte not in printable}
  return {byte: chr(byte) for byte in printable} | rest


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises a `UserError` when the text tower has too few rows for the tokenizer."""
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"model.text.vocab_size={vocab_size} is too small for a tokenizer of {tokenizer.vocab_size} tokens: raise it"
    )


def check_length(tokenizer: Tokenizer, length: int, field: str = "model.text.length") -> None:
  """Raises a `UserError` when captions of so many tokens hold special tokens alone, so that all are one caption."""
  least = tokenizer.special_count + 1
  if length < least:
    raise UserError(
      f"{field}={length} has no room for a caption beside the {least - 1} special tokens of this tokenizer:"
      f" use at least {least}"
    )
