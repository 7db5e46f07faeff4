"""Chunks: the rows of a step that are read at once, and how a batch is put together from them."""

import dataclasses
from typing import Any

import jax
import numpy as np

# Rows worked on at once. Small enough to share a batch among threads, large enough for vectorised work.
CHUNK_ROWS = 64


def chunk_rows(share: int) -> int:
  """Returns the rows of a chunk: a divisor of the share of at most CHUNK_ROWS, or all when only slivers divide it."""
  best = max(rows for rows in range(1, CHUNK_ROWS + 1) if share % rows == 0)
  return best if best >= min(share, CHUNK_ROWS // 4) else share


def joined(chunks: list[Any]) -> Any:
  """Concatenates the fields of chunks, and numbers the rows that their locations name through."""
  if len(chunks) == 1:
    return chunks[0]
  whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
  for name, rows in (("image", "patches"), ("text", "tokens")):
    batch = whole[name]
    if batch.locations is not None:
      per_chunk, pairs = len(getattr(chunks[0][name], rows)), len(chunks[0][name].locations)
      whole[name] = _moved(batch, np.arange(len(batch.locations)) // pairs * per_chunk)
  return whole


def on_host(batch: Any, rows: np.ndarray, host: int) -> Any:
  """Returns a host's images or captions, with locations that name rows of the global batch.

  Args:
    batch: the images or the captions.
    rows: the array of their rows, such as `batch.patches`.
    host: number of the host.
  """
  return batch if batch.locations is None else _moved(batch, np.full(len(batch.locations), host * len(rows)))


def _moved(batch: Any, rows: np.ndarray) -> Any:
  moved = batch.locations + np.stack([rows, np.zeros_like(rows)], axis=1)
  return dataclasses.replace(batch, locations=moved.astype(np.int32))
