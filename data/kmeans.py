"""k-means on the host: centroids of as many rows as fit into memory, which then assign any number of rows."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

# Rows whose distances to all centroids exist at once.
_BLOCK = 1 << 14
# Rows for each centroid that the first centroids are chosen among, and at least.
_EACH, _LEAST = 256, 1 << 12


def fit(
  rows: Float[np.ndarray, "rows dim"],
  count: int,
  *,
  seed: int = 0,
  iterations: int = 100,
  tolerance: float = 1e-5,
  told: Callable[[int, float], None] | None = None,
) -> Float[np.ndarray, "count dim"]:
  """Finds centroids that are nearly the means of the rows that are nearest to them (Lloyd's algorithm).

  Args:
    rows: the rows, of which the first centroids are drawn by k-means++.
    count: number of centroids, at most that of the rows.
    seed: seed of the draw.
    iterations: most rounds of assigning all rows and moving the centroids to their means.
    tolerance: it ends when the centroids have moved by less, as a share of the variance of the rows, in squares.
    told: is given the number of each round and how far the centroids moved in it.

  Returns:
    The centroids. One that loses all its rows stays where it is.

  Lloyd, "Least Squares Quantization in PCM" (1982); Arthur and Vassilvitskii, "k-means++" (2007).

  Examples:
    >>> np.sort(fit(np.float32([[0], [2], [10], [12]]), 2), axis=0).tolist()
    [[1.0], [11.0]]
  """
  centroids = _first(rows, count, np.random.default_rng(seed))
  mean = rows.mean(axis=0, dtype=np.float64)
  variance = float(np.mean([np.mean(np.square(block - mean)) for block in _blocks(rows)])) or 1.0
  for number in range(1, iterations + 1):
    sums, sizes = np.zeros((count, rows.shape[1])), np.zeros(count, np.int64)
    for block in _blocks(rows):
      labels = nearest(block, centroids)
      sizes += np.bincount(labels, minlength=count)
      for label in np.unique(labels):
        sums[label] += block[labels == label].sum(axis=0, dtype=np.float64)
    moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centroids).astype(np.float32)
    shift = float(np.mean(np.square(moved - centroids))) / variance
    centroids = moved
    if told is not None:
      told(number, shift)
    if shift <= tolerance:
      break
  return centroids


def nearest(rows: Float[np.ndarray, "rows dim"], centroids: Float[np.ndarray, "count dim"]) -> Int[np.ndarray, "rows"]:
  """Returns the number of the nearest centroid of each row, the first one of several.

  Examples:
    >>> nearest(np.float32([[0, 1], [3, 0]]), np.float32([[0, 0], [4, 0]])).tolist()
    [0, 1]
  """
  half = np.sum(np.square(centroids, dtype=np.float32), axis=1) / 2
  return np.concatenate([np.argmax(block @ centroids.T - half, axis=1) for block in _blocks(rows)])


def _first(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Draws rows one by one, each with a chance that grows with the square of its distance from those before."""
  some = rows[np.sort(rng.permutation(len(rows))[: max(_LEAST, _EACH * count)])].astype(np.float32)
  chosen = [some[rng.integers(len(some))]]
  distance = np.full(len(some), np.inf)
  while len(chosen) < count:
    distance = np.minimum(distance, np.sum(np.square(some - chosen[-1], dtype=np.float64), axis=1))
    total = distance.sum()
    chances = distance / total if total else None
    chosen.append(some[rng.choice(len(some), p=chances)])
  return np.stack(chosen)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
  return [rows[start : start + _BLOCK] for start in range(0, max(len(rows), 1), _BLOCK)]
