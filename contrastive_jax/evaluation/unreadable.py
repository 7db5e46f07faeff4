"""Evaluation sets without the pictures that cannot be read: which these are, agreed on by all processes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from contrastive_jax.bad_records import BadRecord, BadRecords, retried
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import (
  ChoiceSet,
  Chosen,
  EvaluationSet,
  Images,
  LabelledSet,
  MultiLabelSet,
  PairSet,
)
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import straight
from contrastive_jax.preprocess.video import Clip

# Bytes of a reason that one process tells the others.
_MOST_SAID = 300


class UnreadableSet(UserError):
  """No picture of an evaluation set can be read, or most of its records do not say what theirs shows."""


class Tolerant(Sequence):
  """Images with a grey pixel in the place of each that cannot be read; once read, it knows what was wrong with these.

  Attributes:
    reasons: what was wrong, by the index of the image.
  """

  def __init__(self, images: Images):
    self._images = images
    self.reasons: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Any:
    try:
      item = retried(lambda: self._images[index])
      if isinstance(item, Clip):
        return _TolerantClip(item, self.reasons, index)
      return item if isinstance(item, np.ndarray) and item.ndim == 4 else retried(lambda: straight(item))
    except DecodeError as error:
      self.reasons[index] = str(error)
      return np.full((1, 1, 3), 128, np.uint8)


class _TolerantClip:
  """A clip whose frames are grey where they cannot be read."""

  def __init__(self, clip: Clip, reasons: dict[int, str], index: int):
    self._clip, self._reasons, self._index = clip, reasons, index
    self.count, self.fps = clip.count, clip.fps
    try:
      self.height, self.width = clip.height, clip.width
    except DecodeError as error:
      reasons[index] = str(error)
      self.height = self.width = 1

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> np.ndarray:
    try:
      return retried(lambda: self._clip.read(indices))
    except DecodeError as error:
      self._reasons[self._index] = str(error)
      return np.full((len(indices), 1, 1, 3), 128, np.uint8)


def embedded(
  encode: Callable[[Images], Float[np.ndarray, "images dim"]], images: Images, name: str, ledger: BadRecords
) -> tuple[Float[np.ndarray, "images dim"], Bool[np.ndarray, "images"]]:
  """Embeds images, and says which could be read; every process makes the same call and gets the same answer.

  Args:
    encode: the function that embeds images.
    images: the images, read a batch at a time.
    name: name of the set.
    ledger: counts and names the images that cannot be read.

  Returns:
    An embedding for each image, and whether it could be read; the embedding means nothing where it could not.
  """
  tolerant = Tolerant(images)
  embeddings = encode(tolerant)
  reasons = _of_all_processes(tolerant.reasons, len(images))
  good = np.ones(len(images), bool)
  good[list(reasons)] = False
  ledger.read(len(images))
  for index, reason in reasons.items():
    ledger.add(BadRecord(name, index, reason, use="evaluation"))
  return embeddings, good


def _of_all_processes(reasons: dict[int, str], count: int) -> dict[int, str]:
  """Returns what any process found wrong with some of `count` images, in their order; the first to say why is heard."""
  if jax.process_count() == 1:
    return dict(sorted(reasons.items()))
  bad = np.zeros(count, bool)
  bad[list(reasons)] = True
  rows = np.flatnonzero(np.asarray(multihost_utils.process_allgather(bad)).reshape(-1, count).any(axis=0)).tolist()
  if not rows:
    return {}
  # Arrays of one shape are all that processes can send each other.
  said = np.zeros((len(rows), _MOST_SAID), np.uint8)
  for k, row in enumerate(rows):
    text = reasons.get(row, "").encode()[:_MOST_SAID]
    said[k, : len(text)] = np.frombuffer(text, np.uint8)
  of_each = np.asarray(multihost_utils.process_allgather(said)).reshape(-1, *said.shape)
  texts = of_each[of_each.any(axis=2).argmax(axis=0), np.arange(len(rows))]
  return {row: bytes(text).rstrip(b"\0").decode(errors="ignore") for row, text in zip(rows, texts, strict=True)}


def keep(scored: EvaluationSet, good: Bool[np.ndarray, "images"]) -> tuple[EvaluationSet, Int[np.ndarray, "kept"]]:
  """Leaves images out of a set, with what belongs to them alone.

  Args:
    scored: the set.
    good: which images stay. An instance of a `ChoiceSet` stays when all of its images do.

  Returns:
    The set, and the rows of the images that stay.

  Raises:
    UnreadableSet: if nothing stays.
  """
  each = len(scored.images) // len(scored.captions) if isinstance(scored, ChoiceSet) else 1
  whole = np.asarray(good).reshape(-1, each).all(axis=1)
  rows = np.flatnonzero(np.repeat(whole, each))
  if not len(rows):
    raise UnreadableSet(f"none of the {len(scored.images):,} images of {scored.name} can be read: nothing was scored")
  images = Chosen(scored.images, rows)
  if isinstance(scored, LabelledSet):
    groups = None if scored.groups is None else np.asarray(scored.groups)[rows]
    return dataclasses.replace(scored, images=images, labels=scored.labels[rows], groups=groups), rows
  if isinstance(scored, MultiLabelSet):
    return dataclasses.replace(scored, images=images, labels=scored.labels[rows]), rows
  if isinstance(scored, PairSet):
    groups = scored.image_group[rows]
    kept = np.flatnonzero(np.isin(scored.caption_group, groups))
    captions = [scored.captions[k] for k in kept.tolist()]
    fields = {"images": images, "image_group": groups, "captions": captions}
    return dataclasses.replace(scored, **fields, caption_group=scored.caption_group[kept]), rows
  captions = [scored.captions[k] for k in np.flatnonzero(whole).tolist()]
  return dataclasses.replace(scored, images=images, captions=captions), rows
