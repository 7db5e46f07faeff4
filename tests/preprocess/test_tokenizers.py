"""Tokenizers against the algorithms they promise, written out plainly."""

import gzip
import html
import io
import itertools
import json
import pickle
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.tokenizers import ClipTokenizer, JsonTokenizer, SentencePieceTokenizer, load, train_bpe

CAPTIONS = [
  *(f"a picture of a {animal}" for animal in ("cat", "dog", "tiger", "whale", "catfish")),
  "Grinning Face",
  "ein lächelndes gesicht",
  "笑顔",
  "وجه مبتسم",
  "the dog's bone, 2024!",
] * 4


@pytest.fixture(scope="module")
def bpe():
  return train_bpe(CAPTIONS, 400)


@pytest.fixture(scope="module")
def sentencepiece_model():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=120, model_type="bpe", byte_fallback=False,
    character_coverage=1.0, minloglevel=2,
  )  # fmt: skip
  return model.getvalue()


def bytes_to_symbols():
  """CLIP's table, by its published construction."""
  values = [*range(33, 127), *range(161, 173), *range(174, 256)]
  symbols = values[:]
  for byte in range(256):
    if byte not in values:
      symbols.append(256 + len(values) - 188)
      values.append(byte)
  return dict(zip(values, map(chr, symbols), strict=True))


def merges_of(words, count):
  """A small merges list learned from words by counting pairs, as BPE does."""
  table = bytes_to_symbols()
  split = [[*(table[b] for b in word.encode()[:-1]), table[word.encode()[-1]] + "</w>"] for word in words]
  merges = []
  for _ in range(count):
    pairs = {}
    for word in split:
      for pair in itertools.pairwise(word):
        pairs[pair] = pairs.get(pair, 0) + 1
    if not pairs:
      break
    best = max(sorted(pairs), key=pairs.get)
    merges.append(best)
    split = [merge(word, best) for word in split]
  return merges


def merge(word, pair):
  out = []
  for symbol in word:
    if out and (out[-1], symbol) == pair:
      out[-1] += symbol
    else:
      out.append(symbol)
  return out


class PlainClip:
  """CLIP's tokenizer written as the paper's code describes it: clean, split, then merge the lowest ranked pair."""

  def __init__(self, merges):
    self.table, self.ranks = bytes_to_symbols(), {pair: i for i, pair in enumerate(merges)}
    alphabet = list(self.table.values())
    symbols = [*alphabet, *(s + "</w>" for s in alphabet), *("".join(p) for p in merges)]
    self.ids = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}

  def __call__(self, text):
    text = text.translate(str.maketrans("‘’“”！ａ", "''\"\"!a")).replace("ﬁ", "fi")
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(unicodedata.normalize("NFC", text)))).strip().lower()
    ids = []
    for word in self.split(text):
      if word in ("<|startoftext|>", "<|endoftext|>"):
        ids.append(self.ids[word])
        continue
      data = word.encode()
      symbols = [*(self.table[b] for b in data[:-1]), self.table[data[-1]] + "</w>"]
      while True:
        pairs = [p for p in itertools.pairwise(symbols) if p in self.ranks]
        if not pairs:
          break
        symbols = merge(symbols, min(pairs, key=self.ranks.get))
      ids += [self.ids[s] for s in symbols]
    return [self.ids["<|startoftext|>"], *ids, self.ids["<|endoftext|>"]]

  def split(self, text):
    """Words, single digits, contractions and runs of the rest: a scanner instead of the regular expression."""
    words, i = [], 0

    def kind(c):
      return "L" if c.isalpha() else "N" if unicodedata.category(c)[0] == "N" else " " if c.isspace() else "S"

    while i < len(text):
      special = next((s for s in ("<|startoftext|>", "<|endoftext|>") if text.startswith(s, i)), None)
      short = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s, i)), None)
      if special or short:
        words.append(special or short)
      elif kind(text[i]) == " ":
        i += 1
        continue
      else:
        j = i + 1
        while kind(text[i]) != "N" and j < len(text) and kind(text[j]) == kind(text[i]):
          j += 1
        words.append(text[i:j])
      i += len(words[-1])
    return words


@pytest.fixture(scope="module")
def clip_merges():
  return merges_of(" ".join(CAPTIONS).lower().split(), 80)


@pytest.fixture(scope="module")
def clip_file(clip_merges):
  return gzip.compress("\n".join(['"bpe_simple_vocab"', *(" ".join(p) for p in clip_merges), ""]).encode())


def test_no_script_has_unknown_tokens(bpe):
  plain = huggingface.Tokenizer.from_buffer(bpe.definition()[2])
  for text in ("grinning face", "笑顔とねこ", "😀 emoji", "naïve café"):
    tokens, mask = bpe([text], 64)
    assert mask[0].sum() < 64
    assert plain.decode(tokens[0][mask[0]].tolist()).strip() == text


def test_trained_vocabulary(bpe):
  assert bpe.vocab_size <= 400 and bpe.pad_id == 0
  again = train_bpe(CAPTIONS, 400)
  assert again.fingerprint == bpe.fingerprint
  assert train_bpe(CAPTIONS, 300).fingerprint != bpe.fingerprint
  np.testing.assert_array_equal(bpe(["A CAT"], 8)[0], bpe(["a cat"], 8)[0])
  cased = train_bpe(CAPTIONS, 400, lowercase=False)
  assert not np.array_equal(cased(["A CAT"], 8)[0], cased(["a cat"], 8)[0])
  # Learned from these captions: a frequent word is one token, with its end-of-text token.
  assert bpe(["picture"], 8)[1].sum() == 2


def test_special_tokens_cannot_be_spelled_out(bpe):
  assert (bpe(["<eos> <pad>"], 32)[0] == 1).sum() == 1


@pytest.fixture(params=["bpe", "sentencepiece", "clip"])
def any_tokenizer(request, bpe, sentencepiece_model, clip_file):
  return {"bpe": bpe, "sentencepiece": SentencePieceTokenizer(sentencepiece_model), "clip": ClipTokenizer(clip_file)}[
    request.param
  ]


def test_shapes_padding_and_truncation(any_tokenizer):
  long, short = "a picture of a cat and a dog and a tiger and a whale", "cat"
  tokens, mask = any_tokenizer([long, short, ""], 8)
  assert tokens.shape == mask.shape == (3, 8) and tokens.dtype == np.int32 and mask.dtype == bool
  assert tokens.max() < any_tokenizer.vocab_size
  assert mask[0].all() and mask[2].any()
  assert (tokens[~mask] == any_tokenizer.pad_id).all()
  assert (np.diff(mask.astype(int), axis=1) <= 0).all()
  end = any_tokenizer([""], 8)[0][0, any_tokenizer([""], 8)[1][0].sum() - 1]
  assert tokens[0, -1] == end and tokens[1, mask[1].sum() - 1] == end
  wide = any_tokenizer([long], 77)[0]
  np.testing.assert_array_equal(tokens[0, :-1], wide[0, :7])


def test_tokens_spell_the_caption(any_tokenizer):
  for caption in CAPTIONS[:6]:
    (ids,), (mask,) = any_tokenizer([caption], 60)
    ids = ids[mask].tolist()
    assert any_tokenizer.spelled(ids).strip().casefold() == caption.casefold()
    assert not any_tokenizer.spelled(ids[-1:])  # The end of the text is none of it.
    assert [any_tokenizer.token_id(any_tokenizer.token_of(number)) for number in ids] == ids


def test_a_saved_tokenizer_is_the_same(any_tokenizer, tmp_path):
  any_tokenizer.save(tmp_path / "tokenizer")
  for copy in (load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(any_tokenizer))):
    assert copy.fingerprint == any_tokenizer.fingerprint and copy.vocab_size == any_tokenizer.vocab_size
    texts = [*CAPTIONS, "<eos> <|endoftext|> </s>"]
    np.testing.assert_array_equal(copy(texts, 16)[0], any_tokenizer(texts, 16)[0])


def test_one_string_is_refused(any_tokenizer):
  with pytest.raises(ValueError, match="one string"):
    any_tokenizer("a cat", 8)


def test_any_tokenizer_json(tmp_path):
  bert = huggingface.Tokenizer(
    huggingface.models.WordPiece({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "cat": 5})
  )
  bert.model.unk_token = "[UNK]"
  bert.pre_tokenizer = huggingface.pre_tokenizers.Whitespace()
  bert.post_processor = huggingface.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
  bert.enable_padding(pad_token="[PAD]", length=5)
  bert.enable_truncation(3)
  path = tmp_path / "tokenizer.json"
  bert.save(str(path))
  tokens, mask = load(f"file:{path}")(["a cat", "a cat a cat a dog"], 6)
  assert tokens.tolist() == [[1, 4, 5, 2, 0, 0], [1, 4, 5, 4, 5, 2]]
  assert mask.sum(axis=1).tolist() == [4, 6]


def test_sentencepiece_ends_and_pads_as_siglip(sentencepiece_model, tmp_path):
  path = tmp_path / "a.model"
  path.write_bytes(sentencepiece_model)
  processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
  tokenizer = load(f"sentencepiece:{path}")
  tokens, mask = tokenizer(["a picture of a cat"], 24)
  expected = [*processor.encode("a picture of a cat"), processor.eos_id()]
  assert tokens[0][mask[0]].tolist() == expected
  assert (tokens[0][~mask[0]] == processor.eos_id()).all()  # This model has no padding id.
  lower = load(f"sentencepiece:{path}", lowercase=True)
  np.testing.assert_array_equal(lower(["A Cat"], 8)[0], tokenizer(["a cat"], 8)[0])
  assert lower.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
  "options",
  [
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity"},
    {"normalization_rule_name": "nmt_nfkc_cf", "model_type": "unigram"},
    {"treat_whitespace_as_suffix": True, "user_defined_symbols": ["<eos>"]},
  ],
  ids=str,
)
def test_sentencepiece_models_normalise_as_they_say(options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS), model_writer=model, **{"vocab_size": 120, "model_type": "bpe"} | options,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2, hard_vocab_limit=False,
  )  # fmt: skip
  own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  texts = ["a cat", "  A   Cat ", "", " ", "a\tcat\n", "a\u2581cat", "ﬁsh", "cafe\u0301", "a <unk>cat", "<eos> a"]
  # Tokens that end and pad captions are text where a caption spells them, as in big_vision.
  texts += ["</s>", "a cat </s>", "<pad> a </s> cat"]
  tokens, mask = SentencePieceTokenizer(model.getvalue())(texts, 40)
  for row, text in enumerate(texts):
    assert tokens[row][mask[row]].tolist() == [*own.encode(text), 1]
    assert (tokens[row][mask[row]] == 1).sum() == 1


@pytest.mark.parametrize(
  "text",
  [
    *sorted(set(CAPTIONS)),
    "  a   PICTURE\n of\ta cat  ",
    "the dog's isn't we're I'll",
    "fish &amp; chips &amp;lt;3",
    "2024 was ½ good!!! (really)",
    "naïve café, 😀😀 ok",
    "cafe\u0301",
    "<|endoftext|> a cat",
    "_under_score_",
    "the dog’s “ﬁne” bone！ ａ",
  ],
)
def test_clip_follows_the_plain_algorithm(text, clip_file, clip_merges):
  tokens, mask = ClipTokenizer(clip_file)([text], 77)
  assert tokens[0][mask[0]].tolist() == PlainClip(clip_merges)(text)


def test_clip_special_ids_and_padding(clip_file, clip_merges):
  tokenizer = ClipTokenizer(clip_file)
  size = 512 + len(clip_merges)
  assert tokenizer.vocab_size == size + 2 and tokenizer.pad_id == 0
  tokens, mask = tokenizer(["cat"], 8)
  assert tokens[0, 0] == size and tokens[0, mask[0].sum() - 1] == size + 1


def test_clip_reads_only_as_many_merges_as_the_published_vocabulary():
  # The published file has 262,145 lines; the model uses the first 48,894 merges.
  alphabet = list(bytes_to_symbols().values())
  pairs = [f"{a} {b}" for a in alphabet for b in alphabet][:50_000]
  tokenizer = ClipTokenizer(gzip.compress("\n".join(["header", *pairs]).encode()))
  assert tokenizer.vocab_size == 49408
  assert tokenizer([""], 4)[0].tolist() == [[49406, 49407, 0, 0]]


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("clipp:x", "did you mean 'clip'"),
    ("vocabulary", "must be file:FILE, sentencepiece:FILE, clip:FILE or a directory"),
    ("file:/nowhere/tokenizer.json", "/nowhere/tokenizer.json does not exist"),
  ],
)
def test_impossible_specifications(spec, message):
  with pytest.raises(UserError, match=message):
    load(spec)


@pytest.mark.parametrize("kind", ["file", "sentencepiece", "clip"])
def test_damaged_files_are_named(kind, tmp_path):
  path = tmp_path / "damaged"
  path.write_bytes(b"\x1f\x8b not what it says")
  with pytest.raises(UserError, match="damaged"):
    load(f"{kind}:{path}")


def test_a_directory_of_something_else(tmp_path):
  with pytest.raises(UserError, match="not written by a run"):
    load(tmp_path)


def test_too_small_a_vocabulary():
  with pytest.raises(UserError, match=r"model\.text\.vocab_size=200 must be at least 258"):
    train_bpe(CAPTIONS, 200)


def test_a_length_of_special_tokens_alone_is_refused(bpe, clip_file):
  """It would make one caption of all."""
  for tokenizer, special in ((ClipTokenizer(clip_file), 2), (bpe, 1)):
    for length in range(1, special + 1):
      with pytest.raises(UserError, match=rf"model\.text\.length={length} has no room .* use at least {special + 1}"):
        tokenizer(["cat"], length)
    tokens, _ = tokenizer(["cat", "dog"], special + 1)
    assert (tokens[0] != tokens[1]).any()


def test_saved_description_is_readable(bpe, tmp_path):
  bpe.save(tmp_path)
  assert json.loads((tmp_path / "tokenizer_kind.json").read_text())["kind"] == "file"
  assert isinstance(load(tmp_path), JsonTokenizer)


def test_curly_quotes_are_read_as_straight_ones_where_asked():
  curly, straight = ['a man\N{RIGHT SINGLE QUOTATION MARK}s \N{LEFT DOUBLE QUOTATION MARK}shoe"'], ['a man\'s "shoe"']
  captions = ["a man's shoe", *curly]
  same, apart = (train_bpe(captions, 300, straight_quotes=asked) for asked in (True, False))
  np.testing.assert_array_equal(same(curly, 24)[0], same(straight, 24)[0])
  assert (apart(curly, 24)[0] != apart(straight, 24)[0]).any()
