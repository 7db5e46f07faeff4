"""Evaluation sets: metadata and a reader. The readers themselves live with the data, and are passed in."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from contrastive_jax import inputs
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.arrays import booleans, integers
from contrastive_jax.preprocess.video import Clip


@runtime_checkable
class Images(Protocol):
  """Random access to decoded pictures or clips: a list, or anything that reads item `i` when asked for it."""

  def __len__(self) -> int:
    """Returns the number of items."""
    ...

  def __getitem__(self, index: int, /) -> np.ndarray | Clip:
    """Returns an item: uint8 `[height, width, 3]`, or `[height, width, 4]` with alpha; or a clip. Sizes may differ."""
    ...


class Chosen(Sequence):
  """Some of the images, in any order, read when asked for."""

  def __init__(self, images: Images, rows: Sequence[int] | Int[np.ndarray, "chosen"]):
    self._images, self._rows = images, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> np.ndarray | Clip:
    return self._images[int(self._rows[index])]


def kind_of(images: Images) -> str:
  """Says whether a set shows "images" or "clips"."""
  return "clips" if len(images) and isinstance(images[0], Clip) else "images"


@runtime_checkable
class Encoder(Protocol):
  """A model that is evaluated: `contrastive_jax.inference.Model`, or anything else that embeds images and texts."""

  @property
  def logit_scale(self) -> float:
    """Multiplies cosine similarities before the softmax over classes."""
    ...

  def encode_image(self, images: Images, /) -> np.ndarray:
    """Returns L2-normalised float32 `[images, dim]`."""
    ...

  def encode_text(self, texts: Sequence[str], /) -> np.ndarray:
    """Returns L2-normalised float32 `[texts, dim]`."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSet:
  """Images, each with one right class, for zero-shot classification.

  Attributes:
    name: what the task is called, such as "emoji_openmoji" or "tfds/cifar10".
    images: pictures or clips, read when needed.
    labels: integers `[images]`, indices into `classes`.
    classes: class names, put into the templates; a class may have no image.
    templates: prompts with one `{}` each, such as "a photo of a {}."; their embeddings are averaged.
    groups: integers `[images]` or None; images of equal group show one thing in variants (frames of one clip, skin
      tones), of which the report shows one.
    language: of the class names and the templates, ISO 639-1.
    templates_source: who wrote the templates, or that none are published for the set; "" where it is the set's own.
  """

  name: str
  images: Images
  labels: np.ndarray
  classes: Sequence[str]
  templates: Sequence[str]
  groups: np.ndarray | None = None
  language: str = "en"
  templates_source: str = ""

  def __post_init__(self):
    labels = _checked(self)
    if labels.shape != (len(self.images),):
      raise UserError(
        f"{self.name}: one integer label for each of {len(self.images)} images, got {labels.dtype}{list(labels.shape)}"
      )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
      raise UserError(
        f"{self.name}: labels run from {labels.min()} to {labels.max()}, there are {len(self.classes)} classes"
      )
    if self.groups is not None:
      object.__setattr__(self, "groups", integers(self.groups, f"{self.name}: groups"))
    _check_group(self.name, "groups", self.groups, len(self.images))


@dataclasses.dataclass(frozen=True, eq=False)
class MultiLabelSet:
  """Images, each with any number of right classes, for mean average precision.

  Attributes:
    name: what the task is called.
    images: pictures or clips, read when needed.
    labels: bool `[images, classes]`, whether the image shows the class.
    classes: class names, put into the templates.
    templates: prompts with one `{}` each; their embeddings are averaged.
    language: language of the class names and the templates, ISO 639-1.
    templates_source: who wrote the templates; "" where they are the set's own.
  """

  name: str
  images: Images
  labels: np.ndarray
  classes: Sequence[str]
  templates: Sequence[str]
  language: str = "en"
  templates_source: str = ""

  def __post_init__(self):
    labels = _checked(self)
    if labels.shape != (len(self.images), len(self.classes)):
      raise UserError(
        f"{self.name}: labels is bool[{len(self.images)}, {len(self.classes)}], images by classes, "
        f"got {labels.dtype}{list(labels.shape)}"
      )


@dataclasses.dataclass(frozen=True, eq=False)
class PairSet:
  """Images and captions that belong together, for retrieval.

  Attributes:
    name: what the task is called.
    images: pictures or clips, read when needed.
    captions: the captions, any number for an image.
    image_group: integers `[images]`; an image and a caption belong together when their groups are equal.
    caption_group: integers `[captions]`.
    language: language of the captions, ISO 639-1; "mul" for several.
  """

  name: str
  images: Images
  captions: Sequence[str]
  image_group: np.ndarray
  caption_group: np.ndarray
  language: str = "en"

  def __post_init__(self):
    object.__setattr__(self, "images", inputs.images(self.images, f"{self.name}: images"))
    object.__setattr__(self, "captions", inputs.texts(self.captions, f"{self.name}: captions"))
    for field, count in (("image_group", len(self.images)), ("caption_group", len(self.captions))):
      object.__setattr__(self, field, integers(getattr(self, field), f"{self.name}: {field}"))
      _check_group(self.name, field, getattr(self, field), count)
    alone = np.setxor1d(self.image_group, self.caption_group)
    if len(alone):
      raise UserError(f"{self.name}: group {alone[0]} and {len(alone) - 1} more have images or captions but not both")


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceSet:
  """Instances of a few images and captions that differ little, for matching.

  Attributes:
    name: what the task is called, such as "sugarcrepe/swap_obj" or "winoground".
    images: the images of all instances, one instance after the other, equally many each.
    captions: one list for each instance; caption `k` belongs to image `k`, and those beyond the images to none.
    language: language of the captions, ISO 639-1.
  """

  name: str
  images: Images
  captions: Sequence[Sequence[str]]
  language: str = "en"

  def __post_init__(self):
    object.__setattr__(self, "images", inputs.images(self.images, f"{self.name}: images"))
    captions = [inputs.texts(some, f"{self.name}: captions[{k}]") for k, some in enumerate(self.captions)]
    object.__setattr__(self, "captions", captions)
    lengths = sorted({len(some) for some in self.captions})
    if len(lengths) != 1 or not lengths[0]:
      raise UserError(f"{self.name}: every instance has equally many captions, got {lengths}")
    if not len(self.images) or len(self.images) % len(self.captions):
      raise UserError(
        f"{self.name}: {len(self.captions)} instances have equally many images each, got {len(self.images)} in all"
      )


EvaluationSet = LabelledSet | MultiLabelSet | PairSet | ChoiceSet
# Reads the labels or the captions of a set that was opened; further calls return the same set.
ReadSet = Callable[[], EvaluationSet]


def _checked(labelled: LabelledSet | MultiLabelSet) -> np.ndarray:
  """Puts images, classes, templates and labels into the order of their positions; returns the labels."""
  name = labelled.name
  # Published benchmarks have classes of equal name, and templates that occur twice.
  least, of_kind = (2, integers) if isinstance(labelled, LabelledSet) else (1, booleans)
  fields = {
    "images": inputs.images(labelled.images, f"{name}: images"),
    "classes": inputs.class_names(labelled.classes, f"{name}: classes", least=least, distinct=False),
    "templates": inputs.templates(labelled.templates, f"{name}: templates", distinct=False),
    "labels": of_kind(labelled.labels, f"{name}: labels"),
  }
  for field, value in fields.items():
    object.__setattr__(labelled, field, value)
  return fields["labels"]


def _check_group(name: str, field: str, group: np.ndarray | None, count: int) -> None:
  if group is not None and (np.shape(group) != (count,) or not np.issubdtype(np.asarray(group).dtype, np.integer)):
    raise UserError(f"{name}: {field} holds one integer for each of {count} items, got shape {np.shape(group)}")
