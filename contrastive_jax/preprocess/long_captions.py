"""Captions that are longer than the text tower reads: cut at its end, or a random sentence or span of them is read."""

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from contrastive_jax.preprocess.tokenizers import CaptionEncoder

WAYS = ("truncate", "sentence", "span")
# A sentence ends in one of these marks, and in quotes and brackets behind it, before a blank or the end; the marks of
# Chinese and Japanese need no blank.
_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n+")

Tokenize = Callable[[CaptionEncoder, list[str], int], tuple[np.ndarray, np.ndarray]]


def sentences(caption: str) -> list[str]:
  """Splits a caption into its sentences.

  Examples:
    >>> sentences("A dog runs. It is brown! Why? 3.5 kg")
    ['A dog runs.', 'It is brown!', 'Why?', '3.5 kg']
  """
  starts = [0, *(match.end() for match in _END.finditer(caption)), len(caption)]
  return [part for start, stop in itertools.pairwise(starts) if (part := caption[start:stop].strip())]


def readings(caption: str, how: str) -> list[str]:
  """Returns what may be read of a caption that does not fit, each with equal chances.

  Args:
    caption: the caption.
    how: "truncate" reads its beginning; "sentence" one sentence; "span" all from the beginning of a sentence on.

  Examples:
    >>> readings("A dog. It runs.", "span")
    ['A dog. It runs.', 'It runs.']
  """
  parts = sentences(caption)
  if how == "truncate" or not parts:
    return [caption]
  return parts if how == "sentence" else [" ".join(parts[first:]) for first in range(len(parts))]


def fitted(
  captions: Sequence[str], draws: Sequence[float], how: str, tokenizer: CaptionEncoder, length: int, tokenize: Tokenize
) -> list[str]:
  """Returns what is read of each caption. One that fits is read whole, and whatever still does not fit is cut.

  Args:
    captions: the captions.
    draws: a uniform number in [0, 1) for each.
    how: one of `WAYS`, see `readings`.
    tokenizer: the tokenizer of the text tower.
    length: number of tokens that the tower reads.
    tokenize: tokenizes captions to a length, such as a function that remembers what it has tokenized.
  """
  if how == "truncate":
    return list(captions)
  _, mask = tokenize(tokenizer, list(captions), length)
  # A row that is full may have lost something: with a place more it would be filled as well.
  full = [k for k in range(len(captions)) if mask[k].all()]
  if full:
    _, more = tokenize(tokenizer, [captions[k] for k in full], length + 1)
    full = [k for k, row in zip(full, more, strict=True) if row.all()]
  found = list(captions)
  for k in full:
    parts = readings(captions[k], how)
    found[k] = parts[min(int(draws[k] * len(parts)), len(parts) - 1)]
  return found
