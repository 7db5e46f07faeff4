"""From a run's config to its sources, captions, tokenizer, segments and pipeline."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.training import curriculum
from contrastive_jax.training.curriculum import Segment
from data import emoji
from data.augment import Augment
from data.pipeline import Pipeline
from data.sources import Source
from data.sources.tfds import TfdsSource

EMOJI_SOURCES = ("noto", "twemoji", "noto_tones", "twemoji_tones")


def make_sources(options: Any, names: Iterable[str]) -> dict[str, Source]:
  """Opens sources by name: one of `EMOJI_SOURCES`, or "tfds/<set>" with an optional "@<split>".

  Args:
    options: `config.data`.
    names: of the sources of all segments.

  Raises:
    UserError: for an unknown name, or data that is not on this machine.
  """
  names = list(names)
  for name in names:
    if not name.startswith("tfds/"):
      require_known("data.sources", name, (*EMOJI_SOURCES, "tfds/<set>"))
  drawn = any(name in EMOJI_SOURCES for name in names)
  sources: dict[str, Source] = dict(emoji.training_sources(emoji.CaptionMix(**options.captions))) if drawn else {}
  for name in names:
    if name.startswith("tfds/"):
      dataset, _, split = name.removeprefix("tfds/").partition("@")
      sources[name] = TfdsSource(
        dataset,
        options.data_dir or None,
        split or "train",
        image_key=options.image_key,
        caption_key=options.caption_key,
      )
  return {name: sources[name] for name in names}


def attribution(names: Iterable[str]) -> str:
  """What the licences of the sources ask to be printed; empty where they ask for nothing."""
  return emoji.ATTRIBUTION if any(name in EMOJI_SOURCES for name in names) else ""


def all_captions(sources: Iterable[Source]) -> list[str]:
  """Every caption of the sources once, sorted."""
  return sorted({caption for source in sources for i in range(len(source)) for caption in source.text(i).captions})


def make_tokenizer(options: Any, vocab_size: int, sources: Iterable[Source]) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names, or one trained on the captions of the sources.

  Args:
    options: `config.tokenizer`.
    vocab_size: rows of the text tower's embedding table.
    sources: their captions train a "bpe".

  Raises:
    UserError: if the tokenizer has more tokens than the text tower has rows.
  """
  if options.spec == "bpe":
    return tokenizers.train_bpe(all_captions(sources), vocab_size, lowercase=options.lowercase)
  tokenizer = tokenizers.load(options.spec)
  check_vocabulary(tokenizer, vocab_size)
  return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises a `UserError` when the text tower has too few rows for the tokenizer."""
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"model.text.vocab_size={vocab_size} is too small for a tokenizer of {tokenizer.vocab_size} tokens: raise it"
    )


def make_segments(config: Any, done: Sequence[Mapping[str, Any]], step: int, data_changed: bool) -> tuple[Segment, ...]:
  """The run as segments: what a checkpoint says was done, and what the config says is left.

  Args:
    config: of the run.
    done: the segments of the checkpoint, as dictionaries; empty for a new run.
    step: of the checkpoint.
    data_changed: whether the rest of the run is a new segment.
  """
  planned = Segment(
    steps=config.total_steps,
    batch_size=config.batch_size,
    sources=tuple(sorted(config.data.sources.items())),
    resolution=config.model.vision.image_size,
  )
  before = [Segment.from_dict(fields) for fields in done]
  if before and (data_changed or before[-1].sources != planned.sources):
    before = curriculum.truncate(before, step)
  else:
    before = before[:-1]
  return (*before, dataclasses.replace(planned, steps=config.total_steps - curriculum.total_steps(before)))


def make_pipeline(
  config: Any, segments: Sequence[Segment], sources: Mapping[str, Source], tokenizer: Tokenizer, share: tuple[int, int]
) -> Pipeline:
  """The pipeline of a run; `share` is (index, count) of this host's part of every batch."""
  return Pipeline(
    segments,
    sources,
    tokenizer,
    text_length=config.model.text.length,
    patch_size=config.model.vision.patch_size,
    seed=config.seed,
    augment=Augment(**config.data.augment),
    host_index=share[0],
    host_count=share[1],
    threads=config.data.threads,
    workers=config.data.workers,
    prefetch_bytes=config.data.prefetch_bytes,
  )
