"""Makes the sources, captions, tokenizer and pipeline of a run from its config."""

import functools
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from contrastive_jax import paths
from contrastive_jax.bad_records import BadRecords, readable
from contrastive_jax.errors import UserError, fields_of
from contrastive_jax.evaluation.tasks import ReadSet
from contrastive_jax.objectives.term import TEACHER_TEXT
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.schedule.segments import Segment, ahead, source_names
from contrastive_jax.schedule.stages import source_options
from contrastive_jax.training.distillation import Teacher
from contrastive_jax.training.run import Run
from contrastive_jax.training.targets import TargetCache
from data import tasks
from data.augment import Augment
from data.clusters import open_clusters
from data.extras import ExtrasOptions, TeacherView
from data.kinds import hints, kind_of, open_sources
from data.numbering import id_bases
from data.pipeline import Pipeline
from data.sources import Source
from data.text_augment import TextAugment

# Records whose captions a tokenizer learns from.
MOST_CAPTIONS = 1_000_000


def sample_counts(run: Run) -> dict[str, int]:
  """Returns the number of samples of each source that a run names, in any of its stages."""
  return {name: len(source) for name, source in open_sources(run.config, run.source_names()).items()}


def attribution(names: Iterable[str]) -> str:
  """Returns the credit that the licences of the sources ask for; empty where they ask for none."""
  return "\n".join(dict.fromkeys(kind.attribution for name in names if (kind := kind_of(name)).attribution))


def captions_to_learn(
  sources: Iterable[Source], bad_records: BadRecords | None = None, *, most: int = MOST_CAPTIONS
) -> list[str]:
  """Returns the captions that a tokenizer learns from, each once and sorted; every host returns the same.

  Sources of at most `most` records in all give every caption. Of larger ones so many records are read, evenly spread
  over each source, and each gives one of its captions in turn. No image is decoded, but a record that holds both is
  read as a whole.

  Args:
    sources: the sources.
    bad_records: counts and names the records whose captions cannot be read, which are left out.
    most: the most records that are read.

  Raises:
    UserError: if too many cannot be read, or all of a source.
  """
  sources = list(sources)
  ledger, total = bad_records or BadRecords(), sum(len(source) for source in sources)
  found: set[str] = set()
  for source in sources:
    count = len(source) if total <= most else max(1, len(source) * most // total)
    split, before = getattr(source, "split", ""), ledger.count
    numbers = [k * len(source) // count for k in range(min(count, len(source)))]
    reads = (functools.partial(source.text, index) for index in numbers)
    for k, text in readable(reads, source.name, ledger=ledger, split=split, use="captions", numbers=numbers):
      found.update(text.captions if total <= most else [text.captions[k % len(text.captions)]])
    if numbers and ledger.count - before == len(numbers):
      raise UserError(f"data source {source.name!r} has {len(source):,} records and no caption that can be read")
    ledger.check()
  return sorted(found)


def make_tokenizer(
  options: ConfigDict, vocab_size: int, sources: Iterable[Source], bad_records: BadRecords | None = None
) -> Tokenizer:
  """Makes the tokenizer that `config.tokenizer` names, or trains one on the captions of the sources.

  Args:
    options: `config.tokenizer`.
    vocab_size: number of rows of the text tower's embedding table.
    sources: the sources, whose captions train a "bpe".
    bad_records: counts the captions that cannot be read.

  Raises:
    UserError: if the tokenizer has more tokens than the text tower has rows.
  """
  if options.spec == "bpe":
    how = {"lowercase": options.lowercase, "straight_quotes": options.straight_quotes}
    return tokenizers.train_bpe(captions_to_learn(sources, bad_records), vocab_size, **how)
  if ":" not in options.spec and not paths.typed("tokenizer.spec", options.spec).is_dir():
    raise UserError(
      f"tokenizer.spec={options.spec!r} is unknown: write 'bpe', file:FILE, sentencepiece:FILE, clip:FILE or the"
      " tokenizer directory of a run"
    )
  tokenizer = tokenizers.load(options.spec)
  tokenizers.check_vocabulary(tokenizer, vocab_size)
  return tokenizer


def make_pipeline(
  run: Run,
  segments: Sequence[Segment],
  sources: Mapping[str, Source],
  tokenizer: Tokenizer,
  share: tuple[int, int],
  *,
  start: int = 0,
  teacher: Teacher | None = None,
  bad_records: BadRecords | None = None,
) -> Pipeline:
  """Makes the pipeline of a run.

  Args:
    run: the run, with the sizes, the seed and how data are read.
    segments: the segments that were done and those that are left, as `Run.segments_after` returns them.
    sources: the sources by the names that the segments use.
    tokenizer: the tokenizer of the captions.
    share: (index, count) of this host's part of every batch.
    start: the first step that is asked for, as that of a checkpoint.
    teacher: the frozen teacher that runs beside the model, if one does.
    bad_records: counts and names what cannot be read.
  """
  config = run.config
  with fields_of("data.augment"):
    augment = Augment(**config.data.augment)
  return Pipeline(
    segments,
    sources,
    tokenizer,
    text_length=config.model.text.length,
    patch_size=config.model.image.patch_size,
    seed=config.seed,
    tubelet=config.model.image.tubelet,
    others=run.model.others,
    extras=_extras(run, segments, teacher),
    bad_records=bad_records,
    clusters=open_clusters(config.data.clusters, _clustered(ahead(segments, start))) if config.data.clusters else None,
    long_captions=config.data.long_captions,
    augment=augment,
    start=start,
    host_index=share[0],
    host_count=share[1],
    threads=config.data.threads,
    workers=config.data.workers,
    prefetch_bytes=config.data.prefetch_bytes,
  )


def _extras(run: Run, segments: Sequence[Segment], teacher: Teacher | None) -> ExtrasOptions:
  """Returns what the batches of a run bring beside images, captions and keys."""
  data, cache = run.config.data, run.config.distillation.targets
  with fields_of("data.strong_augment"):
    strong_augment = Augment(**data.strong_augment)
  with fields_of("data.text_augment"):
    text_augment = TextAugment(**data.text_augment)
  return ExtrasOptions(
    run.extras,
    swap_words=data.swap_words,
    strong_augment=strong_augment,
    text_augment=text_augment,
    teacher=teacher and _view_of(teacher, run.objective.needs(TEACHER_TEXT)),
    targets=TargetCache(cache, _taught_bases(segments)).lookup if cache else None,
  )


def _taught_bases(segments: Sequence[Segment]) -> dict[str, int]:
  """Returns the id bases of the sources whose samples a frozen teacher has seen."""
  taught = {name for segment in segments if segment.taught for name in segment.all_sources()}
  return {name: base for name, base in id_bases(segments).items() if name in taught}


def _clustered(segments: Sequence[Segment]) -> list[str]:
  """Returns the names of the sources that give whole batches from one of their clusters."""
  return source_names([segment for segment in segments if segment.clustered])


def _view_of(teacher: Teacher, with_text: bool) -> TeacherView:
  """Returns how a frozen teacher reads the pairs; captions only where a term asks for them."""
  image, text = teacher.config.image, teacher.config.text
  tokenizer = teacher.tokenizer if with_text else None
  return TeacherView(image.grid * image.patch_size, image.patch_size, tokenizer, text.length)


def evaluation_names(names: Iterable[str]) -> tuple[str, ...]:
  """Returns the names of single evaluation sets, of names some of which stand for several; see `tasks.expand`."""
  return tuple(tasks.expand(names))


def evaluation_set(config: ConfigDict, name: str) -> ReadSet:
  """Opens an evaluation set of a run, read as the run reads it for training; see `tasks.opened`.

  Raises:
    UserError: as `tasks.opened` does, and for a split of a set of which the run trains on all.
  """
  whole, at, _ = name.rpartition("@")
  if at and name.startswith(tasks.OWN) and whole in source_options(config):
    raise UserError(
      f"data.sources has all of {whole!r}, which holds what {name!r} is scored on: train on '{whole}@train'"
    )
  return tasks.opened(name, config.data.data_dir, hints=hints(config, name))
