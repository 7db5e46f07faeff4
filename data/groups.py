"""Which pairs of a batch must not be each other's negatives: those that share a group or a caption."""

import functools

import numpy as np
from jaxtyping import Bool, Int

from data.sources import stable_hash

_INT32 = 2**31 - 1


@functools.lru_cache(maxsize=1 << 18)
def _caption_hash(caption: str) -> int:
  return stable_hash(caption)


def key_of(group: int, caption: str) -> tuple[int, int]:
  """The two numbers by which a pair may equal another: its source's group, and its caption."""
  return group, _caption_hash(caption)


def group_labels(
  planned: Int[np.ndarray, "pairs 2"],
  rows: slice,
  actual: Int[np.ndarray, "rows 2"],
  substituted: Bool[np.ndarray, " rows"],
) -> Int[np.ndarray, " rows"]:
  """Labels that are equal where pairs share a group or a caption, directly or through other pairs of the batch.

  Args:
    planned: keys (see `key_of`) of the global batch as the segments plan it, which every host knows.
    rows: the rows of this host.
    actual: keys of what this host's rows hold; differs from `planned` where a bad record was substituted.
    substituted: where that is.

  Returns:
    int32 labels of this host's rows, the same whatever the number of hosts: the first row of the global batch that the
    pair is connected to. A substituted pair takes the label of the planned pairs it equals; if there is none, a label
    of its own beyond the batch size.
  """
  labels = np.arange(len(planned))
  classes = [np.unique(planned[:, column], return_inverse=True)[1] for column in (0, 1)]
  while True:
    before = labels
    for members in classes:
      lowest = np.full(members.max(initial=-1) + 1, len(planned))
      np.minimum.at(lowest, members, labels)
      labels = lowest[members]
    if np.array_equal(labels, before):
      break
  mine = labels[rows].copy()
  for k in np.flatnonzero(substituted):
    equal = labels[(planned == actual[k]).any(axis=1)]
    mine[k] = equal.min() if len(equal) else len(planned) + int(actual[k, 0]) % (_INT32 - len(planned))
  return mine.astype(np.int32)
