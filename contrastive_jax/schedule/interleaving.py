"""Assigns pairs to sources in a fixed periodic order, in which every source keeps to its share at every prefix.

The number of pairs that a source gave to the first `n` is a closed form, so that nothing needs to be stored to resume.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int

# Weights whose exact period is longer are rounded to shares of this many pairs.
LONGEST_PERIOD = 1 << 14

# The name and the weight of each source.
Sources = tuple[tuple[str, int | float], ...]


def draws(sources: Sources, places: int) -> dict[str, int]:
  """Returns how many of the first `places` pairs each source gives: within one of its share, at every prefix."""
  period = _period(sources)
  rounds, rest = divmod(places, len(period.source))
  counts = rounds * period.counts + np.bincount(period.source[:rest], minlength=len(sources))
  return {name: int(count) for (name, _), count in zip(sources, counts, strict=True)}


def assign(sources: Sources, places: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Says which source gives each pair.

  Args:
    sources: the name and weight of each source of the modality.
    places: the pairs, numbered within the segment and modality.

  Returns:
    For each pair the source's position in `sources`, and how many samples that source gave to earlier pairs of the
    segment.
  """
  period = _period(sources)
  rounds, rest = np.divmod(places, len(period.source))
  source = period.source[rest]
  return source, rounds * period.counts[source] + period.rank[rest]


@dataclasses.dataclass(frozen=True)
class _Period:
  """One period of a mixture: each place's source, its rank among that source's places, and each source's number."""

  source: np.ndarray
  rank: np.ndarray
  counts: np.ndarray


@functools.lru_cache(maxsize=256)
def _period(sources: tuple[tuple[str, int | float], ...]) -> _Period:
  """Interleaves the sources so that every prefix holds each within one sample of its share.

  The rule is Tijdeman's (The chairman assignment problem, 1980): among the sources whose next place is due, take
  the one whose deadline is nearest. In units of 1 / (period * (2k - 2)), so that all comparisons are exact.
  """
  counts = _whole_shares([weight for _, weight in sources])
  period, k = sum(counts), len(counts)
  source = np.zeros(period, np.int64)
  if k > 1:
    given = [0] * k
    for place in range(period):
      # Lag of a source: what its share of the places up to this one exceeds what it got.
      lag = [count * (place + 1) - period * got for count, got in zip(counts, given, strict=True)]
      due = [j for j in range(k) if lag[j] * (2 * k - 2) >= period]
      chosen = min(due, key=lambda j: (Fraction((2 * k - 3) * period - (2 * k - 2) * lag[j], counts[j]), j))
      source[place] = chosen
      given[chosen] += 1
  rank = np.zeros(period, np.int64)
  for j in range(k):
    mine = source == j
    rank[mine] = np.arange(np.count_nonzero(mine))
  return _Period(source, rank, np.asarray(counts, np.int64))


def _whole_shares(weights: Sequence[int | float]) -> list[int]:
  """Returns whole numbers proportional to the weights in decimal, rounded only where their sum would be too long."""
  exact = [Fraction(str(weight)) for weight in weights]
  scaled = [weight * math.lcm(*(w.denominator for w in exact)) for weight in exact]
  shares = [int(weight) // math.gcd(*map(int, scaled)) for weight in scaled]
  if sum(shares) <= LONGEST_PERIOD:
    return shares
  total = sum(exact)
  return [max(1, round(weight / total * LONGEST_PERIOD)) for weight in exact]
