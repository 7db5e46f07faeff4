"""The numbers that samples have in a run: their ids, their rows in a state of all samples, and the keys of pairs."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt32, UInt64

from contrastive_jax.schedule.segments import Segment, source_names
from data.sources import stable_hash

_SOURCE_IDS = 1 << 40


def pair_keys(groups: Sequence[int], captions: Sequence[str]) -> UInt32[np.ndarray, "pairs 2 2"]:
  """Returns `Batch.keys`: the words of each pair's group, and those of a hash of its caption as it is chosen.

  They depend on nothing but the pair, so that every host and every release makes the same.
  """
  numbers = [(int(group) % 2**64, stable_hash(caption)) for group, caption in zip(groups, captions, strict=True)]
  return words_of(np.array(numbers, "<u8").reshape(-1, 2))


def words_of(numbers: UInt64[np.ndarray, "*shape"]) -> UInt32[np.ndarray, "*shape 2"]:
  """Returns 64-bit numbers as two words each, low words first, as keys of pairs travel."""
  return numbers.astype("<u8")[..., None].view("<u4")


def id_bases(segments: Sequence[Segment]) -> dict[str, int]:
  """Returns the number that a run adds to the ids of each source's samples, in the order in which sources appear."""
  return {name: number * _SOURCE_IDS for number, name in enumerate(source_names(segments))}


def sample_of(number: int, segments: Sequence[Segment]) -> tuple[str, int]:
  """Returns the source of a sample and its id there, which `id_bases` made into one number.

  Args:
    number: one of `Batch.ids`.
    segments: the segments of the run.
  """
  source, sample = divmod(number, _SOURCE_IDS)
  return source_names(segments)[source], sample


def rows_of(name: str, numbers: Int[np.ndarray, "pairs"], segments: Sequence[Segment]) -> Int[np.ndarray, "rows"]:
  """Returns the rows of a batch whose samples are of one source, by the `Batch.ids` of the whole batch."""
  base = id_bases(segments)[name]
  return np.flatnonzero((numbers >= base) & (numbers < base + _SOURCE_IDS))


def row_bases(lengths: Mapping[str, int]) -> dict[str, int]:
  """Returns the row of each source's first sample in a state of all samples; the sources are sorted by name.

  Args:
    lengths: number of samples of every source of the run.
  """
  names = sorted(lengths)
  return dict(zip(names, itertools.accumulate((lengths[name] for name in names), initial=0), strict=False))
