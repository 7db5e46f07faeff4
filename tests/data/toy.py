"""Sources small enough to know by heart."""

import numpy as np

from contrastive_jax.preprocess.images import DecodeError
from data.sources import Example, Text, stable_hash


class ToySource:
  """Sample i is a plain picture of brightness i with two captions; records in `bad` cannot be decoded."""

  def __init__(self, name, length, *, bad=(), captions=None, groups=None):
    self.name, self.length, self.bad = name, length, frozenset(bad)
    self.captions, self.groups = captions, groups
    self.text_reads = 0

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    if index in self.bad:
      raise DecodeError("made bad for the test")
    image = np.full((12, 12, 3), index % 256, np.uint8)
    image[:, :6] //= 2
    return Example(image, self.text(index), index, flip=True)

  def text(self, index):
    self.text_reads += 1
    captions = self.captions[index] if self.captions else (f"{self.name} {index}", f"a picture of {self.name} {index}")
    group = self.groups[index] if self.groups else stable_hash(self.name, index)
    return Text(tuple(captions), group)


class WordTokenizer:
  """One id a letter: enough to tell captions apart."""

  vocab_size, pad_id, fingerprint = 256, 0, "toy"

  def __call__(self, texts, length):
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
      ids = list(text.encode())[:length]
      tokens[row, : len(ids)] = ids
    return tokens, tokens > 0
