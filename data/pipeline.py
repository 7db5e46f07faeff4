"""`batch(step)`: the pairs of any step of a run, as a pure function of its segments and its seed.

Grain moves the samples: its elements are samples, numbered by step and row within a segment, read by threads or worker
processes a chunk of rows at a time and put together inside the step. There is no iterator state: iterating from any
step gives what `batch` gives for each.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from contrastive_jax.bad_records import BadRecords
from contrastive_jax.batch import Batch, TextBatch
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.models.config import OtherConfig
from contrastive_jax.preprocess import packing
from contrastive_jax.preprocess.long_captions import fitted
from contrastive_jax.preprocess.tokenizers import CaptionEncoder
from contrastive_jax.schedule.segments import Inputs, Segment, ahead, segment_at, total_steps
from data.allocation import keep_freed_memory
from data.augment import DRAWS, Augment
from data.chunks import chunk_rows, joined, on_host
from data.clusters import Clusters, check_clusters
from data.extras import NO_OPTIONS, ExtrasMaker, ExtrasOptions, Pairs
from data.lifetime import follow_parent, start_tracker
from data.mixture import Drawn, drawn, uniforms, whole_blocks
from data.numbering import id_bases, pair_keys
from data.rendering import Renderer, with_frames
from data.sources import Example, Source
from data.substitution import note, read_or_substitute
from data.token_cache import TokenCache


class Pipeline:
  """The data of a run, random access by step.

  Attributes:
    substituted: number of bad records met so far in delivered batches, each replaced by another of its source.
    shrunk: number of images and clips that were made smaller to fit into the rows of their pack, so far.
    truncated: number of captions that were cut to fit into theirs, so far.
  """

  def __init__(
    self,
    segments: Sequence[Segment],
    sources: Mapping[str, Source],
    tokenizer: CaptionEncoder,
    *,
    text_length: int,
    patch_size: int,
    seed: int,
    tubelet: int = 1,
    others: Sequence[OtherConfig] = (),
    augment: Augment | None = None,
    extras: ExtrasOptions = NO_OPTIONS,
    bad_records: BadRecords | None = None,
    clusters: Mapping[str, Clusters] | None = None,
    start: int = 0,
    long_captions: str = "truncate",
    host_index: int = 0,
    host_count: int = 1,
    threads: int = 2,
    workers: int = 0,
    prefetch_bytes: int = 256 << 20,
  ):
    """Checks that the segments can be served.

    Args:
      segments: the segments of the run.
      sources: the sources by the names that the segments use.
      tokenizer: the tokenizer of the captions.
      text_length: number of tokens of a caption, padded or truncated, where a segment has none of its own.
      patch_size: side of a patch in pixels.
      seed: seed of shuffling, captions and augmentation.
      tubelet: number of frames of a patch of a clip.
      others: the towers beside those of images and texts, which read `Example.others`.
      augment: the random views; None only resizes, onto white.
      extras: what batches bring beside images, captions and keys.
      bad_records: counts and names what cannot be read, in this process wherever it was read; None counts alone.
      clusters: the clusters of each source, for segments whose batches are of one cluster each.
      start: the first step that is asked for, before which no clusters are needed.
      long_captions: what is read of a caption that does not fit, one of `long_captions.WAYS`.
      host_index: number of this host, which serves the rows from `host_index * batch_size / host_count` on.
      host_count: number of hosts that share each batch.
      threads: number of threads that read in each process; 0 reads when asked.
      workers: number of processes that read; 0 reads in this one.
      prefetch_bytes: bound of the bytes that are read ahead, at least one chunk of rows.

    Raises:
      UserError: if a segment names an unknown source, or its sizes do not divide.
    """
    keep_freed_memory()
    self._segments = tuple(segments)
    self._sources = dict(sources)
    self._tokenizer = tokenizer
    self._text_length = text_length
    self._long_captions = long_captions
    self._clusters, self._extras = clusters or {}, extras
    self._others = tuple(others)
    self._patch_size = patch_size
    self._seed = seed
    self._render = Renderer(augment or Augment(), patch_size, tubelet)
    self._bad_records = bad_records or BadRecords()
    self._host_index, self._host_count = host_index, host_count
    self._threads, self._workers, self._prefetch_bytes = threads, workers, prefetch_bytes
    self._tokenize = TokenCache()
    self.substituted = self.shrunk = self.truncated = 0
    self._check(start)
    for name, source in self._sources.items() if self._others else ():
      # What a tower reads is compared with what the source gives before anything is compiled.
      self._check_others(name, read_or_substitute(source, 0, lambda example: example)[0])
    self._lengths = {name: len(source) for name, source in self._sources.items()}
    self._id_base = id_bases(self._segments)
    self._make_extras = ExtrasMaker(extras, self._lengths, tokenizer, self._tokenize, self._render, seed=seed)

  @property
  def segments(self) -> tuple[Segment, ...]:
    """The segments of the run."""
    return self._segments

  @property
  def cluster_digests(self) -> dict[str, str]:
    """A digest of the clusters of each source that gives whole batches from one of them."""
    return {name: clusters.digest for name, clusters in self._clusters.items()}

  def __len__(self) -> int:
    """Returns the number of steps."""
    return total_steps(self._segments)

  def batch(self, step: int) -> Batch:
    """Reads this host's share of a step's batch, now.

    Raises:
      IndexError: if the run has no such step.
      OSError: if a record cannot be read after several attempts.
    """
    share = self._share(step)
    chunk = self._segment(step).pack_pairs or share
    return self._assemble(step, [self._load_rows(step, row, chunk) for row in range(0, share, chunk)])

  def ids(self, step: int) -> Int[np.ndarray, "pairs"]:
    """Returns the sample ids of a step's whole global batch as planned, the same on any host, without reading anything.

    They are `batch(step).ids` of all hosts in order, save that a bad record stands under its own id.
    """
    size = self._share(step) * self._host_count
    plan = drawn(self._segments, self._lengths, self._seed, step, slice(0, size), self._clusters)
    return np.array([self._id_base[name] for name in plan.names], np.int64)[plan.source] + plan.index

  def kinds(self, start: int) -> Iterator[tuple[Segment, str, int]]:
    """Yields the segment, modality and row length of each kind of batch, once and in the order of their first steps.

    Args:
      start: the first step that counts.
    """
    for index, segment in enumerate(self._segments):
      before = total_steps(self._segments[:index])
      number = sum(len({*self._row_lengths(segment.inputs(modality))}) for modality in segment.modalities)
      met: set[tuple[str, int]] = set()
      for offset in range(max(0, start - before), segment.steps):
        modality = segment.modality_at(offset)[0]
        length = self._row_length(segment.inputs(modality), before + offset)
        if (modality, length) not in met:
          met.add((modality, length))
          yield segment, modality, length
        if len(met) == number:
          break

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
    segment = self._segment(start)
    chunk = segment.pack_pairs or chunk_rows(share)
    samples = grain.MapDataset.range(start * share, stop * share)
    chunks = samples.batch(chunk).map(functools.partial(self._load_samples, share))
    chunk_bytes = max(self._chunk_bytes(segment, modality, chunk) for modality in segment.modalities)
    buffered = max(1, self._prefetch_bytes // (chunk_bytes * max(1, self._workers)))
    if self._workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags, which a library call leaves unparsed.
      start_tracker()
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
    plan = drawn(self._segments, self._lengths, self._seed, step, slice(first, first + count), self._clusters)
    at, offset = segment_at(self._segments, step)
    segment = self._segments[at]
    inputs = segment.inputs(segment.modality_at(offset)[0])
    frames = uniforms(self._seed, "frames", plan.position, count, 4)[:, 0]
    examples, failed = [], []
    for k in range(count):
      if k and plan.copy[k] and isinstance(examples[-1].image, np.ndarray):
        examples.append(examples[-1])
        failed.append("")
        continue
      source = self._sources[plan.names[plan.source[k]]]
      prepare = functools.partial(with_frames, inputs=inputs, draw=float(frames[k]))
      example, failures = read_or_substitute(source, int(plan.index[k]), prepare)
      failed.append(failures)
      examples.append(example)
    text_length = segment.caption_length(self._text_length)
    captions = self._captions(examples, plan, text_length)
    draws = uniforms(self._seed, "augment", plan.position, count, DRAWS)
    length = self._row_length(inputs, step)
    dropping = self._dropping(inputs, plan.position, count)
    image, shrunk = self._render(examples, inputs, draws, length, dropping)
    text, truncated = self._text(captions, segment)
    names = [plan.names[s] for s in plan.source]
    pairs = Pairs(plan.position, names, examples, captions, draws, dropping, segment.taught)
    return {
      "image": image,
      "text": text,
      "others": self._stacked(names, examples),
      "ids": np.array([self._id_base[name] + e.id for name, e in zip(names, examples, strict=True)], np.int64),
      "extras": self._make_extras(pairs, inputs, length, text_length),
      "keys": pair_keys([example.text.group for example in examples], captions),
      "failed": np.array(failed),
      "shrunk": np.array([shrunk]),
      "truncated": np.array([truncated]),
    }

  def _captions(self, examples: list[Example], plan: Drawn, length: int) -> list[str]:
    """Returns the caption of each example, or what is read of it where it is longer than `length` tokens."""
    # An image that makes several pairs may have made some of them in rows before these.
    before = int(plan.copy[0])
    uniform = uniforms(self._seed, "caption", plan.position - before, before + len(examples), 4)
    draws, parts = uniform[:, 0].tolist(), uniform[before:, 1].tolist()
    captions = [
      example.text.choose(draws[before + k])
      if not copy
      else example.text.choose_others(draws[before + k - copy : before + k + 1])[-1]
      for k, (example, copy) in enumerate(zip(examples, plan.copy.tolist(), strict=True))
    ]
    return fitted(captions, parts, self._long_captions, self._tokenizer, length, self._tokenize)

  def _stacked(self, names: list[str], examples: list[Example]) -> dict[str, Any]:
    """Returns what other towers read of the examples, stacked along a new first axis."""
    for name, example in zip(names, examples, strict=True):
      self._check_others(name, example)
    return {
      other.name: jax.tree.map(lambda *leaves: np.stack(leaves), *(example.others[other.name] for example in examples))
      for other in self._others
    }

  def _check_others(self, name: str, example: Example) -> None:
    for other in self._others:
      other.check(example.others.get(other.name), f"a sample of data source {name!r}")

  def _dropping(self, inputs: Inputs, position: int, count: int) -> Float[np.ndarray, "{count} draws"] | None:
    """Draws what patches images drop, from a stream of its own for each number of draws: an image has its own block."""
    if not inputs.drop_patches:
      return None
    width = whole_blocks(max(self._row_lengths(inputs)))
    return uniforms(self._seed, f"dropped patches {width}", position, count, width)

  def _row_length(self, inputs: Inputs, step: int) -> int:
    """Returns the length of rows that are not packed before patches are dropped; NaFlex draws it for each batch."""
    lengths = self._row_lengths(inputs)
    if len(lengths) == 1:
      return lengths[0]
    return lengths[int(uniforms(self._seed, "row length", step, 1, 4)[0, 0] * len(lengths))]

  def _row_lengths(self, inputs: Inputs) -> tuple[int, ...]:
    return inputs.row_lengths(self._patch_size, self._render.tubelet)

  def _text(self, captions: list[str], segment: Segment) -> tuple[TextBatch, int]:
    """Captions in rows of their own or packed, and how many were cut."""
    tokens, mask = self._tokenize(self._tokenizer, captions, segment.caption_length(self._text_length))
    if segment.text_rows is None:
      return TextBatch(tokens, mask), 0
    rows = segment.text_rows
    packed = packing.pack_texts(mask.sum(axis=1), rows=rows.count, length=rows.length)
    return packing.place_texts(tokens, packed), packed.truncated

  def _assemble(self, step: int, chunks: list[dict[str, Any]]) -> Batch:
    fields = joined(chunks)
    self.substituted += int((fields["failed"] != "").sum())
    note(self._bad_records, fields["failed"])
    self.shrunk += int(fields["shrunk"].sum())
    self.truncated += int(fields["truncated"].sum())
    image, text, lookup = fields["image"], fields["text"], self._extras.targets
    return Batch(
      image=on_host(image, image.patches, self._host_index),
      text=on_host(text, text.tokens, self._host_index),
      keys=fields["keys"],
      ids=fields["ids"],
      others=fields["others"],
      targets=lookup(fields["ids"]) if lookup and self._segment(step).taught else None,
      **fields["extras"],
    )

  def _chunk_bytes(self, segment: Segment, modality: str, pairs: int) -> int:
    """Bounds the bytes of a chunk."""
    inputs, patch = segment.inputs(modality), self._patch_size
    own = pairs * inputs.kept(max(self._row_lengths(inputs)))
    tokens = own if inputs.rows is None else inputs.rows.count * inputs.rows.length
    bytes_of_token = 3 * patch * patch * (1 if inputs.frames == 1 else self._render.tubelet) + 8
    leaves = jax.tree.leaves([other.inputs() for other in self._others])
    bytes_of_others = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    asked, text_length = self._extras.asked, segment.caption_length(self._text_length)
    return asked.images * tokens * bytes_of_token + pairs * (5 * text_length * asked.texts + bytes_of_others)

  def _share(self, step: int) -> int:
    return self._segment(step).batch_size // self._host_count

  def _segment(self, step: int) -> Segment:
    return self._segments[segment_at(self._segments, step)[0]]

  def __getstate__(self) -> dict[str, Any]:
    # Only the process that delivers batches counts.
    return self.__dict__ | {"_bad_records": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    # The first that a worker process does for us is to unpickle what it is to read.
    follow_parent()
    keep_freed_memory()
    self.__dict__.update(state)

  def _check(self, start: int) -> None:
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
    self._extras.check(self._sources)
    for segment in self._segments:
      for name in segment.all_sources():
        if name not in self._sources:
          known = ", ".join(sorted(self._sources))
          raise UserError(f"unknown data source {name!r}{nearest(name, self._sources)}, known are {known}")
        if not len(self._sources[name]):
          raise UserError(f"data source {name!r} is empty")
      if segment.batch_size % self._host_count:
        raise UserError(f"batch_size={segment.batch_size} must be a multiple of the {self._host_count} hosts")
      if segment.batch_size // self._host_count % (segment.pack_pairs or 1):
        raise UserError(
          f"the {segment.batch_size // self._host_count} pairs of each of {self._host_count} hosts are not whole packs"
          f" of data.pack_pairs={segment.pack_pairs}"
        )
      if self._extras.asked.state_rows and segment.captions_per_image > 1:
        raise UserError(
          f"data.captions_per_image={segment.captions_per_image} shows a sample several times in a step, and the"
          " objective remembers one value for it: leave it at 1"
        )
      segment.check_patches(self._patch_size)
    for segment in ahead(self._segments, start):
      for name in segment.all_sources() if segment.clustered else ():
        check_clusters(name, self._clusters.get(name), len(self._sources[name]), segment.images)
