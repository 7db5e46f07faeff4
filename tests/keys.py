"""The keys of a batch, from small numbers."""

import numpy as np


def keys_of(group, caption=None):
  """`Batch.keys` of numbered groups and captions; without captions every pair has its own.

  Numbers become 64-bit keys that may agree in either word where they differ in the other.
  """
  caption = np.arange(len(group)) if caption is None else caption
  numbers = np.stack([group, caption], axis=1).astype(np.uint32)
  return np.stack([numbers % 3, numbers // 3], axis=2)
