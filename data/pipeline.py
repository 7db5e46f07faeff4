"""`batch(step)`: the pairs of any step of a run, as a pure function of its segments and its seed.

Grain moves the samples: its elements are samples, numbered by step and row within a segment, read by threads or worker
processes a chunk of rows at a time and put together inside the step. There is no iterator state: iterating from any
step gives what `batch` gives for each.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess.images import DecodeError, patchify
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.training.curriculum import Segment, segment_at, total_steps
from data.augment import DRAWS, Augment
from data.groups import group_labels, key_of
from data.mixture import drawn, uniforms
from data.sources import Example, Source, Text, stable_hash

# Seconds before each further attempt to read a record after an I/O error; then the run stops.
RETRY_DELAYS = (0.1, 1.0, 5.0)
# Records tried in the place of a bad one before the source counts as broken.
SUBSTITUTES = 16
# Rows worked on at once. Small enough to share a batch among threads, large enough for vectorised work.
CHUNK_ROWS = 64
_CACHED_CAPTIONS = 1 << 18
_SOURCE_IDS = 1 << 40


class Pipeline:
  """The data of a run, random access by step.

  Attributes:
    substituted: bad records met so far in delivered batches, each replaced by another of its source.
  """

  def __init__(
    self,
    segments: Sequence[Segment],
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    text_length: int,
    patch_size: int,
    seed: int,
    augment: Augment | None = None,
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 2,
    workers: int = 0,
    prefetch_bytes: int = 256 << 20,
  ):
    """Checks that the segments can be served.

    Args:
      segments: the run.
      sources: by the names that the segments use.
      tokenizer: of the captions.
      text_length: tokens a caption, padded or truncated.
      patch_size: side of a patch in pixels.
      seed: of shuffling, captions and augmentation.
      augment: None only resizes, onto white.
      host_index: this host; it serves the rows from `host_index * batch_size / host_count` on.
      host_count: hosts that share each batch.
      threads: that read in each process; 0 reads when asked.
      workers: processes; 0 reads in this one.
      prefetch_bytes: bound of what is read ahead, at least one chunk of rows.

    Raises:
      UserError: if a segment names an unknown source, or its sizes do not divide.
    """
    self._segments = tuple(segments)
    self._sources = dict(sources)
    self._tokenizer = tokenizer
    self._text_length = text_length
    self._patch_size = patch_size
    self._seed = seed
    self._augment = augment or Augment()
    self._host_index, self._host_count = host_index, host_count
    self._threads, self._workers, self._prefetch_bytes = threads, workers, prefetch_bytes
    self._tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    self.substituted = 0
    self._check()
    self._lengths = {name: len(source) for name, source in self._sources.items()}
    order = dict.fromkeys(name for segment in self._segments for name, _ in segment.sources)
    self._id_base = {name: number * _SOURCE_IDS for number, name in enumerate(order)}

  @property
  def segments(self) -> tuple[Segment, ...]:
    """The run."""
    return self._segments

  def __len__(self) -> int:
    """Number of steps."""
    return total_steps(self._segments)

  def batch(self, step: int) -> Batch:
    """This host's share of a step's batch, read now.

    Raises:
      IndexError: if the run has no such step.
      OSError: if a record cannot be read after several attempts.
    """
    share = self._share(step)
    return self._assemble(step, [self._load_rows(step, 0, share)])

  def ids(self, step: int) -> Int[np.ndarray, "pairs"]:
    """Sample ids of a step's whole global batch as planned, without reading anything; any host gives the same.

    They are `batch(step).ids` of all hosts in order, save that a bad record stands under its own id.
    """
    size = self._share(step) * self._host_count
    plan = drawn(self._segments, self._lengths, self._seed, step, slice(0, size))
    return np.array([self._id_base[name] for name in plan.names], np.int64)[plan.source] + plan.index

  def iterate(self, start_step: int, stop_step: int) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) for a range of steps, reading ahead; each batch equals `batch(step)` bit for bit."""
    step = start_step
    while step < stop_step:
      at, offset = segment_at(self._segments, step)
      stop = min(stop_step, step - offset + self._segments[at].steps)
      yield from self._iterate_segment(step, stop)
      step = stop

  def _iterate_segment(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    share = self._share(start)
    chunk = _chunk_rows(share)
    samples = grain.MapDataset.range(start * share, stop * share)
    chunks = samples.batch(chunk).map(functools.partial(self._load_samples, share))
    resolution = self._segments[segment_at(self._segments, start)[0]].resolution
    chunk_bytes = chunk * (3 * resolution * resolution + 5 * self._text_length)
    buffered = max(1, self._prefetch_bytes // (chunk_bytes * max(1, self._workers)))
    if self._workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags, which a library call leaves unparsed.
      inside = grain.ReadOptions(num_threads=min(self._threads, buffered), prefetch_buffer_size=buffered)
      ahead = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
      dataset = chunks.to_iter_dataset(inside).mp_prefetch(ahead)
    else:
      threads = min(self._threads, buffered)
      dataset = chunks.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered if threads else 0)
      )
    iterator = iter(dataset)
    try:
      for step in range(start, stop):
        yield step, self._assemble(step, [next(iterator) for _ in range(share // chunk)])
    finally:
      iterator.close()

  def _load_samples(self, share: int, numbers: np.ndarray) -> dict[str, Any]:
    step, row = divmod(int(numbers[0]), share)
    return self._load_rows(step, row, len(numbers))

  def _load_rows(self, step: int, row: int, count: int) -> dict[str, Any]:
    """Reads `count` of this host's rows of a step, from `row` on."""
    first = self._host_index * self._share(step) + row
    plan = drawn(self._segments, self._lengths, self._seed, step, slice(first, first + count))
    chosen = uniforms(self._seed, "caption", plan.position, count, 4)[:, 0]
    examples, captions, planned, bad = [], [], [], []
    for k in range(count):
      source = self._sources[plan.names[plan.source[k]]]
      example, replaced = _read_or_substitute(source, int(plan.index[k]))
      bad.append(replaced)
      examples.append(example)
      captions.append(example.text.choose(chosen[k]))
      planned.append(_planned_key(source, int(plan.index[k]), chosen[k]) if replaced else None)
    actual = np.array([key_of(e.text.group, c) for e, c in zip(examples, captions, strict=True)], np.int64)
    resolution = self._segments[segment_at(self._segments, step)[0]].resolution
    draws = uniforms(self._seed, "augment", plan.position, count, DRAWS)
    pixels = self._augment([e.image for e in examples], [e.flip for e in examples], resolution, draws)
    patches = patchify(pixels, self._patch_size)
    tokens, mask = self._tokenize(captions)
    bases = [self._id_base[plan.names[s]] for s in plan.source]
    return {
      "patches": patches.patches,
      "coords": patches.coords,
      "tokens": tokens,
      "mask": mask,
      "ids": np.array([base + e.id for base, e in zip(bases, examples, strict=True)], np.int64),
      "actual": actual,
      "planned": np.array([a if p is None else p for a, p in zip(actual, planned, strict=True)], np.int64),
      "bad": np.array(bad),
    }

  def _assemble(self, step: int, chunks: list[dict[str, np.ndarray]]) -> Batch:
    fields = chunks[0] if len(chunks) == 1 else {k: np.concatenate([c[k] for c in chunks]) for k in chunks[0]}
    share = len(fields["ids"])
    mine = slice(self._host_index * share, (self._host_index + 1) * share)
    planned = fields["planned"] if self._host_count == 1 else self._plan_keys(step, mine, fields["planned"])
    group = group_labels(planned, mine, fields["actual"], fields["bad"])
    self.substituted += int(fields["bad"].sum())
    return Batch(
      image=ImageBatch(fields["patches"], fields["coords"]),
      text=TextBatch(fields["tokens"], fields["mask"], group),
      ids=fields["ids"],
    )

  def _plan_keys(self, step: int, mine: slice, known: np.ndarray) -> np.ndarray:
    """What groups the pairs of the global batch; the other hosts' from their texts, without their images."""
    size = self._share(step) * self._host_count
    plan = drawn(self._segments, self._lengths, self._seed, step, slice(0, size))
    chosen = uniforms(self._seed, "caption", plan.position, size, 4)[:, 0]
    keys = np.empty((size, 2), np.int64)
    keys[mine] = known
    for k in [*range(mine.start), *range(mine.stop, size)]:
      source = self._sources[plan.names[plan.source[k]]]
      keys[k] = _planned_key(source, int(plan.index[k]), chosen[k])
    return keys

  def _tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = {caption: self._tokens.get(caption) for caption in captions}
    new = [caption for caption, row in rows.items() if row is None]
    if new:
      tokens, mask = self._tokenizer(new, self._text_length)
      rows.update({caption: (tokens[k], mask[k]) for k, caption in enumerate(new)})
      if len(self._tokens) + len(new) > _CACHED_CAPTIONS:
        self._tokens.clear()
      self._tokens.update({caption: rows[caption] for caption in new})
    return np.stack([rows[c][0] for c in captions]), np.stack([rows[c][1] for c in captions])

  def _share(self, step: int) -> int:
    return self._segments[segment_at(self._segments, step)[0]].batch_size // self._host_count

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_tokens": {}}

  def _check(self) -> None:
    if not self._segments:
      raise UserError("the run has no segments, give at least one")
    if not 0 <= self._host_index < self._host_count:
      raise UserError(f"host_index is {self._host_index}, with {self._host_count} hosts it is below {self._host_count}")
    for field, value, least in (
      ("text_length", self._text_length, 1),
      ("patch_size", self._patch_size, 1),
      ("threads", self._threads, 0),
      ("workers", self._workers, 0),
      ("prefetch_bytes", self._prefetch_bytes, 1),
    ):
      if value < least:
        raise UserError(f"{field} is {value}, it must be at least {least}")
    for segment in self._segments:
      for name, _ in segment.sources:
        if name not in self._sources:
          known = ", ".join(sorted(self._sources))
          raise UserError(f"unknown data source {name!r}{nearest(name, self._sources)}, known are {known}")
        if not len(self._sources[name]):
          raise UserError(f"data source {name!r} is empty")
      if segment.batch_size % self._host_count:
        raise UserError(f"batch_size {segment.batch_size} does not divide among {self._host_count} hosts")
      if segment.resolution % self._patch_size:
        raise UserError(f"resolution {segment.resolution} is not a multiple of the patch size {self._patch_size}")


def _chunk_rows(share: int) -> int:
  """Rows of a chunk: a divisor of the share of at most CHUNK_ROWS, or all when only slivers divide it."""
  best = max(rows for rows in range(1, CHUNK_ROWS + 1) if share % rows == 0)
  return best if best >= min(share, CHUNK_ROWS // 4) else share


def _read_or_substitute(source: Source, index: int) -> tuple[Example, bool]:
  """Reads a sample, or the first readable one after it when its record is bad for good, and says if it did."""
  for attempt in range(SUBSTITUTES + 1):
    try:
      return _retry(source.__getitem__, (index + attempt) % len(source)), attempt > 0
    except DecodeError as error:
      logging.getLogger(__name__).warning("%s: record %d is bad (%s)", source.name, index + attempt, error)
      last = error
  raise UserError(f"data source {source.name!r} has {SUBSTITUTES + 1} bad records in a row from {index} on ({last})")


def _planned_key(source: Source, index: int, draw: float) -> tuple[int, int]:
  """What groups a pair that some host reads, known without its image; a pair of its own when the text is bad too."""
  try:
    text: Text = _retry(source.text, index)
  except DecodeError:
    lone = stable_hash("bad", source.name, index)
    return lone, lone
  return key_of(text.group, text.choose(draw))


def _retry(read: Callable[[int], Any], index: int) -> Any:
  for delay in (*RETRY_DELAYS, None):
    try:
      return read(index)
    except OSError:
      if delay is None:
        raise
      time.sleep(delay)
