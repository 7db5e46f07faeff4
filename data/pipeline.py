"""`batch(step)`: the pairs of any step of a run, as a pure function of its segments and its seed.

Grain moves the samples: its elements are samples, numbered by step and row within a segment, read by threads or worker
processes a chunk of rows at a time and put together inside the step. There is no iterator state: iterating from any
step gives what `batch` gives for each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from contrastive_jax.bad_records import BadRecords
from contrastive_jax.batch import Batch, HardCaptions, StrongViews, Targets, TeacherInputs, TextBatch
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.models.config import OtherConfig
from contrastive_jax.preprocess import packing
from contrastive_jax.preprocess.long_captions import fitted
from contrastive_jax.preprocess.tokenizers import CaptionEncoder
from contrastive_jax.schedule.segments import Inputs, Segment, ahead, segment_at, total_steps
from data.allocation import keep_freed_memory
from data.augment import DRAWS, STRONG, Augment
from data.chunks import chunk_rows, joined, on_host
from data.clusters import Clusters, check_clusters
from data.hard_captions import DRAWS_EACH, chosen
from data.lifetime import follow_parent, start_tracker
from data.mixture import Drawn, drawn, uniforms
from data.numbering import id_bases, pair_keys, row_bases, words_of
from data.rendering import Renderer, with_frames
from data.sources import Example, Source, stable_hash
from data.substitution import note, read_or_substitute
from data.text_augment import TextAugment

_CACHED_CAPTIONS = 1 << 18


@dataclasses.dataclass(frozen=True)
class TeacherView:
  """The views of the pairs that a frozen teacher reads, which runs beside the student.

  Attributes:
    size: side of its images in pixels.
    patch_size: side of its patches in pixels.
    tokenizer: tokenizer of its text tower, or None where no term needs its captions.
    text_length: number of tokens of its captions.
  """

  size: int
  patch_size: int
  tokenizer: CaptionEncoder | None = None
  text_length: int = 0


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
    teacher: TeacherView | None = None,
    targets: Callable[[Int[np.ndarray, "pairs"]], Targets] | None = None,
    bad_records: BadRecords | None = None,
    state_rows: bool = False,
    weights: bool = False,
    replay: Sequence[str] | None = None,
    hard_captions: int = 0,
    swap_words: bool = False,
    strong_images: int = 0,
    strong_texts: int = 0,
    strong_augment: Augment = STRONG,
    text_augment: TextAugment | None = None,
    present_in: Mapping[str, Sequence[str]] | None = None,
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
      text_length: number of tokens of a caption, padded or truncated.
      patch_size: side of a patch in pixels.
      seed: seed of shuffling, captions and augmentation.
      tubelet: number of frames of a patch of a clip.
      others: the towers beside those of images and texts, which read `Example.others`.
      augment: the random views; None only resizes, onto white.
      teacher: the views of a frozen teacher, whose inputs are then part of every batch.
      targets: a function that looks up outputs of a frozen teacher by sample ids, for every batch.
      bad_records: counts and names what cannot be read, in this process wherever it was read; None counts alone.
      state_rows: names for every pair the row of its sample in the state of the objective, see `row_bases`.
      weights: weighs every pair, by the columns of its source that say how much.
      replay: sources whose pairs are marked as replayed, all where it is empty; None marks none.
      hard_captions: number of wrong captions that every pair gets beside its own.
      swap_words: makes those that a sample lacks, by an exchange of two words of the pair's caption.
      strong_images: number of strong views of its image that every pair gets beside the one of `augment`.
      strong_texts: number of changed captions that every pair gets beside its own.
      strong_augment: the strong views.
      text_augment: the changes of captions; None is those that `TextAugment` has by default.
      present_in: the sources whose pairs take part in a term, by the names of the terms that some are kept from.
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
    self._long_captions, self._remembers = long_captions, state_rows
    self._weighs, self._hard, self._swaps = weights, hard_captions, swap_words
    self._strong_images, self._strong_texts = strong_images, strong_texts
    self._text_augment = text_augment or TextAugment()
    self._present_in = {term: frozenset(names) for term, names in (present_in or {}).items()}
    self._clusters, self._replay = clusters or {}, replay
    self._others = tuple(others)
    self._patch_size = patch_size
    self._seed = seed
    self._augment = augment or Augment()
    self._render = Renderer(self._augment, patch_size, tubelet)
    self._render_strongly = Renderer(strong_augment, patch_size, tubelet)
    self._teacher, self._targets = teacher, targets
    self._bad_records = bad_records or BadRecords()
    self._host_index, self._host_count = host_index, host_count
    self._threads, self._workers, self._prefetch_bytes = threads, workers, prefetch_bytes
    self._tokens: dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]] = {}
    self.substituted = self.shrunk = self.truncated = 0
    self._check(start)
    for name, source in self._sources.items() if self._others else ():
      # What a tower reads is compared with what the source gives before anything is compiled.
      self._check_others(name, read_or_substitute(source, 0, lambda example: example)[0])
    self._lengths = {name: len(source) for name, source in self._sources.items()}
    self._id_base = id_bases(self._segments)
    self._row_base = row_bases(self._lengths) if state_rows else None

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
    captions = self._captions(examples, plan)
    draws = uniforms(self._seed, "augment", plan.position, count, DRAWS)
    length = self._row_length(inputs, step)
    image, shrunk = self._render(examples, inputs, draws, length)
    text, truncated = self._text(captions, segment)
    names = [plan.names[s] for s in plan.source]
    return {
      "image": image,
      "text": text,
      "others": self._stacked(names, examples),
      "teacher": self._teacher_inputs(examples, captions, draws) if self._teacher and segment.taught else None,
      "ids": np.array([self._id_base[name] + e.id for name, e in zip(names, examples, strict=True)], np.int64),
      "state_rows": self._state_rows(names, examples),
      "weights": np.array([e.text.weight for e in examples], np.float32) if self._weighs else None,
      "replayed": None
      if self._replay is None
      else np.array([not self._replay or name in self._replay for name in names], np.float32),
      "hard_captions": self._hard_captions(examples, captions, plan.position) if self._hard else None,
      "present_in": {term: np.array([name in some for name in names]) for term, some in self._present_in.items()},
      "strong": self._strong(examples, captions, inputs, plan.position, length),
      "keys": pair_keys([example.text.group for example in examples], captions),
      "failed": np.array(failed),
      "shrunk": np.array([shrunk]),
      "truncated": np.array([truncated]),
    }

  def _captions(self, examples: list[Example], plan: Drawn) -> list[str]:
    """Returns the caption of each example, or what is read of it where it is too long."""
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
    return fitted(captions, parts, self._long_captions, self._tokenizer, self._text_length, self._tokenize)

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

  def _state_rows(self, names: list[str], examples: list[Example]) -> Int[np.ndarray, "pairs"] | None:
    if self._row_base is None:
      return None
    for name, example in zip(names, examples, strict=True):
      if not 0 <= example.id < self._lengths[name]:
        raise UserError(
          f"data source {name!r} gives a sample the id {example.id}, with {self._lengths[name]} samples: an objective"
          " that keeps a state for every sample needs ids below that number"
        )
    return np.array(
      [self._row_base[name] + example.id for name, example in zip(names, examples, strict=True)], np.int32
    )

  def _row_length(self, inputs: Inputs, step: int) -> int:
    """Returns the length of the rows that are not packed; NaFlex draws it for each batch."""
    lengths = self._row_lengths(inputs)
    if len(lengths) == 1:
      return lengths[0]
    return lengths[int(uniforms(self._seed, "row length", step, 1, 4)[0, 0] * len(lengths))]

  def _row_lengths(self, inputs: Inputs) -> tuple[int, ...]:
    return inputs.row_lengths(self._patch_size, self._render.tubelet)

  def _text(self, captions: list[str], segment: Segment) -> tuple[TextBatch, int]:
    """Captions in rows of their own or packed, and how many were cut."""
    tokens, mask = self._tokenize(self._tokenizer, captions, self._text_length)
    if segment.text_rows is None:
      return TextBatch(tokens, mask), 0
    rows = segment.text_rows
    packed = packing.pack_texts(mask.sum(axis=1), rows=rows.count, length=rows.length)
    return packing.place_texts(tokens, packed), packed.truncated

  def _hard_captions(self, examples: list[Example], captions: list[str], position: int) -> HardCaptions:
    each = DRAWS_EACH * self._hard
    draws = uniforms(self._seed, "hard captions", position, len(examples), -(-each // 4) * 4)[:, :each].tolist()
    found = [
      chosen(example.text, caption, self._hard, self._swaps, own)
      for example, caption, own in zip(examples, captions, draws, strict=True)
    ]
    # Where there is none, the pair's own stands in its place: it has tokens.
    flat = [wrong or caption for some, caption in zip(found, captions, strict=True) for wrong in some]
    shape = len(examples), self._hard, self._text_length
    rows = (part.reshape(shape) for part in self._tokenize(self._tokenizer, flat, self._text_length))
    return HardCaptions(*rows, np.array([[wrong is not None for wrong in some] for some in found]))

  def _strong(
    self, examples: list[Example], captions: list[str], inputs: Inputs, position: int, length: int
  ) -> StrongViews | None:
    """Returns the strong views of consecutive pairs; None where no term reads any."""
    count, images, texts = len(examples), self._strong_images, self._strong_texts
    patches = tokens = mask = keys = places = None
    if images:
      draws = uniforms(self._seed, "strong images", position, count, images * DRAWS).reshape(count, images, DRAWS)
      # The size of a view depends on its image alone, so that the patches lie where those of `Batch.image` do.
      views = [self._render_strongly(examples, inputs, draws[:, k], length)[0].patches for k in range(images)]
      patches = np.stack(views, axis=1)
      if inputs.resolution.mode == "fixed":
        pixels, flips = [example.image for example in examples], [example.flip for example in examples]
        places = self._render_strongly.augment.places
        places = np.stack([places(pixels, flips, inputs.resolution.size, draws[:, k]) for k in range(images)], axis=1)
    if texts:
      draws = uniforms(self._seed, "strong texts", position, count, -(-texts // 4) * 4)[:, :texts].tolist()
      changed = [
        self._text_augment(caption, draw) for caption, own in zip(captions, draws, strict=True) for draw in own
      ]
      # Hardly any of them comes again, so that they have no place among the tokens that are kept.
      rows = self._tokenizer(changed, self._text_length)
      tokens, mask = (part.reshape(count, texts, self._text_length) for part in rows)
      keys = words_of(np.array([stable_hash(caption) for caption in changed], np.uint64).reshape(count, texts))
    return StrongViews(patches, tokens, mask, keys, places) if images or texts else None

  def _teacher_inputs(self, examples: list[Example], captions: list[str], draws: np.ndarray) -> TeacherInputs:
    teacher = self._teacher
    view = dataclasses.replace(self._render, patch_size=teacher.patch_size)
    text = None
    if teacher.tokenizer is not None:
      text = TextBatch(*self._tokenize(teacher.tokenizer, captions, teacher.text_length))
    return TeacherInputs(view.squares(examples, draws, teacher.size), text)

  def _assemble(self, step: int, chunks: list[dict[str, Any]]) -> Batch:
    fields = joined(chunks)
    self.substituted += int((fields["failed"] != "").sum())
    note(self._bad_records, fields["failed"])
    self.shrunk += int(fields["shrunk"].sum())
    self.truncated += int(fields["truncated"].sum())
    image, text = fields["image"], fields["text"]
    return Batch(
      image=on_host(image, image.patches, self._host_index),
      text=on_host(text, text.tokens, self._host_index),
      keys=fields["keys"],
      ids=fields["ids"],
      state_rows=fields["state_rows"],
      weights=fields["weights"],
      replayed=fields["replayed"],
      hard_captions=fields["hard_captions"],
      strong=fields["strong"],
      present_in=fields["present_in"],
      others=fields["others"],
      teacher=fields["teacher"],
      targets=self._targets(fields["ids"]) if self._targets and self._segment(step).taught else None,
    )

  def _tokenize(self, tokenizer: CaptionEncoder, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    whose = tokenizer.fingerprint, length
    rows = {caption: self._tokens.get((*whose, caption)) for caption in captions}
    new = [caption for caption, row in rows.items() if row is None]
    if new:
      tokens, mask = tokenizer(new, length)
      rows.update({caption: (tokens[k], mask[k]) for k, caption in enumerate(new)})
      if len(self._tokens) + len(new) > _CACHED_CAPTIONS:
        self._tokens.clear()
      self._tokens.update({(*whose, caption): rows[caption] for caption in new})
    return np.stack([rows[c][0] for c in captions]), np.stack([rows[c][1] for c in captions])

  def _chunk_bytes(self, segment: Segment, modality: str, pairs: int) -> int:
    """Bounds the bytes of a chunk."""
    inputs, patch = segment.inputs(modality), self._patch_size
    own = pairs * max(self._row_lengths(inputs))
    tokens = own if inputs.rows is None else inputs.rows.count * inputs.rows.length
    bytes_of_token = 3 * patch * patch * (1 if inputs.frames == 1 else self._render.tubelet) + 8
    leaves = jax.tree.leaves([other.inputs() for other in self._others])
    bytes_of_others = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    images, texts = 1 + self._strong_images, 1 + self._hard + self._strong_texts
    return images * tokens * bytes_of_token + pairs * (5 * self._text_length * texts + bytes_of_others)

  def _share(self, step: int) -> int:
    return self._segment(step).batch_size // self._host_count

  def _segment(self, step: int) -> Segment:
    return self._segments[segment_at(self._segments, step)[0]]

  def __getstate__(self) -> dict[str, Any]:
    # Only the process that delivers batches counts.
    return self.__dict__ | {"_tokens": {}, "_bad_records": None}

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
    for key, used, option in (
      ("weight_key", self._weighs, "loss_options.softmax.pair_weights=True"),
      ("wrong_caption_key", self._hard > 0, "loss_options.softmax.hard_captions=1"),
    ):
      having = [name for name, source in self._sources.items() if getattr(source, key, "")]
      if having and not used:
        raise UserError(f"{key} of data source {having[0]!r} has no use: leave it out, or set {option}")
      if used and not having and not (self._hard and self._swaps):
        more = ", or set data.swap_words=True" if self._hard else ""
        raise UserError(f"{option} finds no source with a {key}: give it to an entry of data.sources{more}")
    if self._swaps and not self._hard:
      raise UserError("data.swap_words=True has no use: leave it out, or set loss_options.softmax.hard_captions=1")
    for field, changed, used in (
      ("strong_augment", self._render_strongly.augment != STRONG, self._strong_images),
      ("text_augment", self._text_augment != TextAugment(), self._strong_texts),
    ):
      if changed and not used:
        raise UserError(f"data.{field} has no use: leave it as it is, or add strong_views to the objective")
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
      if self._remembers and segment.captions_per_image > 1:
        raise UserError(
          f"data.captions_per_image={segment.captions_per_image} shows a sample several times in a step, and the"
          " objective remembers one value for it: leave it at 1"
        )
      segment.check_patches(self._patch_size)
    for segment in ahead(self._segments, start):
      for name in segment.all_sources() if segment.clustered else ():
        check_clusters(name, self._clusters.get(name), len(self._sources[name]), segment.images)
