"""From positions in a run to samples: shuffling and random draws as functions of (seed, what, number)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from contrastive_jax.schedule.interleaving import assign
from contrastive_jax.schedule.segments import Segment, cursors, pairs_before, segment_at
from data.clusters import Clusters
from data.sources import stable_hash

_ROUNDS = 6


# Numbers of a block of Philox 4x64.
_BLOCK = 4


def whole_blocks(draws: int) -> int:
  """Returns the width of `uniforms` that has room for so many draws.

  Examples:
    >>> whole_blocks(8), whole_blocks(9)
    (8, 12)
  """
  return -(-draws // _BLOCK) * _BLOCK


def uniforms(seed: int, what: str, start: int, count: int, width: int) -> Float[np.ndarray, "{count} {width}"]:
  """Draws uniform numbers in [0, 1), one row for each of the positions from `start` on.

  Row k is the start of the stream of a Philox generator with the key (seed, what), its counter set to a block that
  belongs to position `start + k` alone. Blocks follow each other, so neighbours cost one generator, not one each.

  Args:
    seed: seed of the run.
    what: name of the purpose; two purposes share no numbers.
    start: first position.
    count: number of positions.
    width: number of draws for each position, a multiple of 4, as `whole_blocks` returns it.

  Examples:
    >>> some = uniforms(0, "caption", start=10, count=3, width=4)
    >>> np.array_equal(some[2:], uniforms(0, "caption", start=12, count=1, width=4))
    True
  """
  bits = np.random.Philox(key=[stable_hash(seed), stable_hash(what)], counter=[start * (width // _BLOCK), 0, 0, 0])
  return np.random.Generator(bits).random((count, width))


def permuted(numbers: Int[np.ndarray, " n"], length: int, *what: object) -> Int[np.ndarray, " n"]:
  """Returns the position of each number in a pseudo-random permutation of `range(length)`.

  It is a Feistel network over the next even power of two, walked until it lands inside the range. It does for a whole
  batch in one go what Grain's `MapDataset.shuffle` does one index at a time (21 us).

  Args:
    numbers: the numbers, in `[0, length)`.
    length: size of the permuted range.
    *what: any values, which choose the permutation.

  Examples:
    >>> sorted(permuted(np.arange(5), 5, "shuffle", 0).tolist())
    [0, 1, 2, 3, 4]
  """
  half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
  mask = np.uint64((1 << int(half)) - 1)
  keys = [np.uint64(stable_hash(*what, round_number)) for round_number in range(_ROUNDS)]
  out = np.asarray(numbers).astype(np.uint64)
  outside = np.arange(len(out))
  while len(outside):
    left, right = out[outside] >> half, out[outside] & mask
    for key in keys:
      mixed = _mix(right ^ key)
      mixed &= mask
      mixed ^= left
      left, right = right, mixed
    out[outside] = (left << half) | right
    outside = outside[out[outside] >= length]
  return out.astype(np.int64)


def shuffled(draws: Int[np.ndarray, " n"], length: int, seed: int, name: str) -> Int[np.ndarray, " n"]:
  """Returns the index of a source's sample for each of its draws: every epoch is a permutation of its own.

  Examples:
    >>> shuffled(np.arange(4, 8), 4, seed=0, name="noto").sum()  # The second epoch of four samples.
    np.int64(6)
  """
  epoch, number = np.divmod(draws, length)
  if not len(draws):
    return number
  first, last = int(epoch.min()), int(epoch.max())
  if first == last:
    return permuted(number, length, "shuffle", seed, name, first)
  out = np.empty_like(number)
  for e in range(first, last + 1):
    mine = epoch == e
    out[mine] = permuted(number[mine], length, "shuffle", seed, name, e)
  return out


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The samples at consecutive positions of the run.

  Attributes:
    position: position of the first of them in the run.
    names: the sources of the step's modality.
    source: for each position, an index into `names`.
    index: for each position, the sample's index in its source.
    copy: for each position, how many positions before it in the step show the same drawn sample; 0 where each sample
      makes one pair.
  """

  position: int
  names: tuple[str, ...]
  source: np.ndarray
  index: np.ndarray
  copy: np.ndarray


def drawn(
  segments: Sequence[Segment],
  lengths: Mapping[str, int],
  seed: int,
  step: int,
  rows: slice,
  clusters: Mapping[str, Clusters] | None = None,
) -> Drawn:
  """Says which samples fill consecutive rows of a step's global batch.

  Args:
    segments: the segments of the run.
    lengths: number of samples of each source.
    seed: seed of the run.
    step: step of the run.
    rows: start and stop of the rows within the global batch.
    clusters: the clusters of each source, for segments that are clustered.
  """
  at, offset = segment_at(segments, step)
  segment = segments[at]
  modality, earlier = segment.modality_at(offset)
  sources = segment.inputs(modality).sources
  image, copy = np.divmod(np.arange(rows.start, rows.stop), segment.captions_per_image)
  names = tuple(name for name, _ in sources)
  if segment.clustered:
    turn, number = (int(one[0]) for one in assign(sources, np.array([earlier])))
    batch = _batches_before(segments, at, names[turn]) + number
    source = np.full(len(image), turn)
    index = _one_cluster(clusters[names[turn]], image, segment.images, batch, seed, names[turn])
  else:
    source, number = assign(sources, earlier * segment.images + image)
    begun = cursors(segments, at)
    index = np.empty_like(number)
    for k, name in enumerate(names):
      mine = source == k
      index[mine] = shuffled(number[mine] + begun[name], lengths[name], seed, name)
  position = pairs_before(segments, at) + offset * segment.batch_size + rows.start
  return Drawn(position, names, source, index, copy)


def _batches_before(segments: Sequence[Segment], at: int, name: str) -> int:
  """Counts the batches that a source gave alone in the clustered ones of the segments before `at`."""
  return sum(
    segment.draws(modality, segment.steps_of(modality, segment.steps)).get(name, 0) // segment.images
    for segment in segments[:at]
    if segment.clustered
    for modality in segment.modalities
  )


def _one_cluster(
  clusters: Clusters, places: Int[np.ndarray, " n"], size: int, batch: int, seed: int, name: str
) -> Int[np.ndarray, " n"]:
  """Returns the samples of some places of a batch that is drawn from a single cluster of a source.

  In an epoch every cluster gives as many batches as its samples fill, in a random order of all batches. No sample comes
  twice in it, and those that fill no batch wait for the next one, which shuffles anew.

  Args:
    clusters: the clusters of the source.
    places: places within the batch, below `size`.
    size: number of samples of a batch.
    batch: number of the batch among those of the source.
    seed: seed of the run.
    name: name of the source.
  """
  ends = np.cumsum(clusters.sizes // size)
  epoch, number = divmod(batch, int(ends[-1]))
  turn = permuted(np.array([number]), int(ends[-1]), "clusters", seed, name, epoch)[0]
  cluster = int(np.searchsorted(ends, turn, side="right"))
  rank = int(turn - ends[cluster] + clusters.sizes[cluster] // size)
  inside = permuted(rank * size + places, int(clusters.sizes[cluster]), "shuffle", seed, name, epoch, cluster)
  return np.asarray(clusters.members[clusters.starts[cluster] + inside], np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
  """Applies the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
  values = values ^ (values >> np.uint64(30))
  values *= np.uint64(0xBF58476D1CE4E5B9)
  values ^= values >> np.uint64(27)
  values *= np.uint64(0x94D049BB133111EB)
  values ^= values >> np.uint64(31)
  return values
