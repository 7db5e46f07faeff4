"""Sets prepared by TensorFlow Datasets, read by random access and without TensorFlow."""

import functools
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contrastive_jax import paths
from contrastive_jax.errors import UserError, nearest
from contrastive_jax.evaluation.benchmarks import GENERIC, GENERIC_TEMPLATES
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet, ReadSet
from contrastive_jax.evaluation.unreadable import UnreadableSet
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import WHITE
from data.sources import Example, Text, names_a_side, stable_hash, stores
from data.sources.answers import answers, pair_set, refuse_most, when_scored
from data.sources.features import described, holds_pictures, holds_text, is_image, is_picture, read_picture, read_texts
from data.sources.frames import StoredFrames, read_videos_as_frames
from data.sources.splits import Range, ranges

# Sets that this project prepares itself.
_OWN = {"sklearn_digits": "python -m data.digits --data_dir={data_dir}"}
_PREPARE = "pip install tensorflow-cpu && tfds build {name} --data_dir={data_dir} --file_format=array_record"


class TfdsSource:
  """Image-text pairs for training: captions stored in the records, or made from class names."""

  def __init__(
    self,
    name: str,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    *,
    image_key: str = "image",
    caption_key: str = "caption",
    templates: Sequence[str] = GENERIC_TEMPLATES,
    flip: bool = True,
  ):
    """Opens a set.

    Args:
      name: name of the set, "name", "name/config" or "name/config:version".
      data_dir: TFDS's directory of sets; None is TFDS's own default.
      split: the split, such as "train" or "train[:90%]".
      image_key: feature of the image or the clip.
      caption_key: feature of the caption, of a sequence of captions, or of a class, whose name then makes the captions.
      templates: templates that are put around the class name.
      flip: whether images may be mirrored; those whose captions name left or right never are.

    Raises:
      UserError: if the set is not there or lacks a feature.
    """
    self.name, self.split = f"tfds/{name}", split
    self._records = Records(name, data_dir, split)
    self._image_key, self._caption_key = image_key, caption_key
    self._flip, self._salt = flip, stable_hash("tfds", name, split)
    self._records.require(image_key, caption_key)
    self._records.require_pictures(image_key)
    self._records.require_one_class(caption_key)
    self._of_class: list[Text] | None = None
    if getattr(self._records.features[caption_key], "names", None):
      self._of_class = [
        Text(tuple(template.format(words) for template in templates), stable_hash("tfds", name, "class", words))
        for words in self._records.class_names(caption_key)
      ]
    else:
      self._records.require_texts(caption_key)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int, /) -> Example:
    record = self._records[index]
    text = self._text(index, record)
    flip = self._flip and not names_a_side(text.captions)
    return Example(read_picture(record[self._image_key], None), text, index, flip)

  def text(self, index: int) -> Text:
    return self._text(index, self._records[index])

  def stored(self, index: int) -> bytes | np.ndarray:
    """Returns a picture as it is stored, as `PictureSource.stored` does; raises `DecodeError` for a clip."""
    value = self._records[index][self._image_key]
    if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype.kind != "O"):
      return value
    raise DecodeError("the record has no picture" if value is None else "it is a clip, and no picture")

  def sample_name(self, index: int) -> str:
    """Returns the number of a record, by which the set names it."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    return str(index)

  def shard_of(self, index: int) -> str:
    """Returns the file that holds a record."""
    return self._records.shard_of(index)

  @property
  def shares_groups(self) -> bool:
    """Whether records of one class are of one group."""
    return self._of_class is not None

  def _text(self, index: int, record: Mapping[str, Any]) -> Text:
    value = record[self._caption_key]
    if self._of_class is not None:
      if np.ndim(value) or not 0 <= value < len(self._of_class):
        raise DecodeError(f"label {value} is none of {len(self._of_class)} classes")
      return self._of_class[int(value)]
    captions = tuple(caption for caption in read_texts(value) if caption.strip())
    if not captions:
      raise DecodeError("the record has no caption")
    return Text(captions, (self._salt + index) & (2**63 - 1))


class Records(Sequence):
  """The records of a split as dictionaries, with pictures and clips as they are stored. Worker processes reopen it."""

  def __init__(self, name: str, data_dir: str | os.PathLike | None, split: str):
    """Opens a split, with the arguments of `TfdsSource`."""
    self.name, self._split = name, split
    self._data_dir = os.fspath(paths.typed("data_dir", data_dir or default_data_dir()))
    self._open  # noqa: B018 - what is missing is told now, not at the first step.

  def __len__(self) -> int:
    return len(self._open[1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads a record.

    Raises:
      DecodeError: if its bytes are damaged.
      UserError: if the whole shard is.
      OSError: if it cannot be read now.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    return stores.read(self._open[1], index, self.name)

  def shard_of(self, index: int) -> str:
    """Returns the file that holds a record; "" where that is not known."""
    return stores.shard_of(self._open[1], index)

  @property
  def features(self) -> Mapping[str, Any]:
    """The TFDS features by key."""
    return dict(self._open[0].info.features)

  @property
  def ranges(self) -> list[Range]:
    """Ranges of the stored records that the split consists of."""
    return ranges(self._split, self._open[0].info.splits, self.name)

  def require(self, *keys: str) -> None:
    """Raises UserError if the records lack one of the features."""
    for key in keys:
      if key not in self.features:
        known = ", ".join(sorted(self.features))
        raise UserError(
          f"the TFDS set {self.name!r} has no feature {key!r}{nearest(key, self.features)}, it has {known}"
        )

  def require_pictures(self, key: str) -> None:
    """Raises UserError if a feature holds neither pictures, nor clips, nor the uint8 or uint16 pixels of pictures."""
    import tensorflow_datasets as tfds

    if not holds_pictures(self.features[key], tfds.features):
      pictures = [name for name, feature in self.features.items() if holds_pictures(feature, tfds.features)]
      raise UserError(
        f"feature {key!r} of the TFDS set {self.name!r} holds no pictures, it is {described(self.features[key])}: "
        f"name one of {', '.join(sorted(pictures)) or 'another set, this one has none'}"
      )

  def require_texts(self, key: str) -> None:
    """Raises UserError if a feature holds anything but text, or a sequence of texts."""
    if not holds_text(self.features[key]):
      raise UserError(
        f"feature {key!r} of the TFDS set {self.name!r} holds no text, it is {described(self.features[key])}: "
        f"name one of {', '.join(self.text_keys) or 'another set, this one has none'}"
      )

  @property
  def picture_keys(self) -> list[str]:
    """Names of the features that hold pictures or clips."""
    import tensorflow_datasets as tfds

    return sorted(key for key, feature in self.features.items() if is_picture(feature, tfds.features))

  @property
  def text_keys(self) -> list[str]:
    """Names of the features that hold text."""
    return sorted(key for key, feature in self.features.items() if holds_text(feature))

  def require_one_class(self, key: str) -> None:
    """Raises UserError if a feature holds a class for each of several things, such as the pixels of a mask."""
    feature = self.features[key]
    if getattr(feature, "names", None) and getattr(feature, "shape", ()) != ():
      raise UserError(
        f"feature {key!r} of the TFDS set {self.name!r} has several classes a record, name a feature with one class"
      )

  def label_names(self, key: str) -> list[str]:
    """Returns the names of a label's classes as TFDS has them, in the order of the labels."""
    feature = self.features[key]
    names = getattr(feature, "names", None)
    if not names:
      raise UserError(f"feature {key!r} of the TFDS set {self.name!r} has no class names, name its captions instead")
    return list(names)

  def class_names(self, key: str) -> list[str]:
    """Returns the names of a label's classes as words, in the order of the labels."""
    return [name.replace("_", " ") for name in self.label_names(key)]

  @functools.cached_property
  def _open(self) -> tuple[Any, Any]:
    import tensorflow_datasets as tfds  # Half a second, for who reads such sets.

    read_videos_as_frames()
    command = _OWN.get(self.name, _PREPARE).format(name=self.name, data_dir=shlex.quote(self._data_dir))
    try:
      builder = tfds.core.read_only_builder.builder_from_files(self.name, data_dir=self._data_dir)
    except Exception as error:  # TFDS raises what its parsers do for files that are damaged.
      raise stores.unopened(self.name, self._data_dir, error, command) from error
    expected = sum(part.stop - part.start for part in ranges(self._split, builder.info.splits, self.name))
    images = [key for key, feature in builder.info.features.items() if is_image(feature, tfds.features)]
    try:
      records = builder.as_data_source(split=self._split, decoders=dict.fromkeys(images, _AsStored()))
    except NotImplementedError:
      stored = builder.info.file_format.value
      raise UserError(
        f"the TFDS set {self.name!r} is stored as {stored}, without random access, prepare it again with: {command}"
      ) from None
    except (UserError, IndexError):
      raise
    except Exception as error:
      raise stores.unopened(self.name, self._data_dir, error, command) from error
    stores.check_shards(records, self.name, command)
    # TFDS reads Parquet by whole splits only, and has been seen to write fewer records than it counts.
    if len(records) != expected:
      raise UserError(
        f"split {self._split!r} of the TFDS set {self.name!r} should hold {expected} records and gives {len(records)}, "
        f"prepare it as array_record: {command}"
      )
    return builder, records

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != "_open"}


class Images(Sequence):
  """The images or clips of some records, decoded when asked for; the pixels of images multiplied by `pixel_scale`.

  Images whose answers are bad, as the numbers of their records and why, cannot be read either.
  """

  def __init__(self, records: Sequence, image_key: str, pixel_scale: int = 1, bad: Mapping[int, str] | None = None):
    self._records, self._image_key, self._pixel_scale, self._bad = records, image_key, pixel_scale, bad or {}

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> np.ndarray | StoredFrames:
    if index in self._bad:
      raise DecodeError(self._bad[index])
    shown = read_picture(self._records[index][self._image_key], WHITE)
    return shown if self._pixel_scale == 1 else shown * np.uint8(self._pixel_scale)


class _AsStored:
  """A decoder for TFDS that leaves a picture, or each frame of a clip, encoded."""

  def setup(self, *, feature: Any) -> None:
    """Part of TFDS's protocol."""

  def decode_example_np(self, example: Any) -> Any:
    return example

  decode_batch_example_np = decode_example_np


def labelled(
  name: str,
  data_dir: str | os.PathLike | None = None,
  split: str = "test",
  *,
  image_key: str = "image",
  label_key: str = "label",
) -> ReadSet:
  """Opens a set for zero-shot classification with the generic prompt, its classes named by its metadata.

  Args:
    name: name of the set, "name", "name/config" or "name/config:version".
    data_dir: TFDS's directory of sets; None is TFDS's own default.
    split: the split to test on.
    image_key: feature of the image or the clip.
    label_key: feature of the class.

  Returns:
    A function that reads its labels and returns it as a `LabelledSet`.

  Raises:
    UserError: if the set is not there, lacks a feature, or has no labels in this split.
  """
  records = Records(name, data_dir, split)
  records.require(image_key, label_key)
  records.require_pictures(image_key)
  records.require_one_class(label_key)
  classes = records.class_names(label_key)

  def label_of(record: Mapping[str, Any]) -> int:
    value = record[label_key]
    if np.ndim(value) or not 0 <= value < len(classes):
      raise DecodeError(f"label {value} is none of {len(classes)} classes")
    return int(value)

  def read() -> LabelledSet:
    labels, bad = answers(records, label_of, 0)
    what = f"split {split!r} of the TFDS set {name!r}"
    if bad and all(why.startswith("label -") for why in bad.values()) and len(bad) == len(records):
      raise UnreadableSet(f"{what} has no labels, name another split")
    remedy = "without a usable label, the first is record {first} ({why}): name another split"
    refuse_most(bad, len(records), what, remedy)
    images, labels = Images(records, image_key, bad=bad), np.array(labels, np.int64)
    return LabelledSet(f"tfds/{name}", images, labels, classes, GENERIC_TEMPLATES, templates_source=GENERIC)

  return when_scored(records, label_of, read)


def paired(
  name: str,
  data_dir: str | os.PathLike | None = None,
  split: str = "test",
  *,
  image_key: str = "image",
  caption_key: str = "captions",
) -> ReadSet:
  """Opens a set for retrieval; each image belongs with all captions of its record.

  Args:
    name: name of the set, "name", "name/config" or "name/config:version".
    data_dir: TFDS's directory of sets; None is TFDS's own default.
    split: the split to test on.
    image_key: feature of the image.
    caption_key: feature of the caption, or of a sequence of captions.

  Raises:
    UserError: if the set is not there or lacks a feature.
  """
  records = Records(name, data_dir, split)
  records.require(image_key, caption_key)
  records.require_pictures(image_key)
  records.require_texts(caption_key)

  def read() -> PairSet:
    captions, bad = captions_of(records, caption_key)
    remedy = f"without a caption in {caption_key!r}, the first is record {{first}}: name another feature or split"
    refuse_most(bad, len(records), f"split {split!r} of the TFDS set {name!r}", remedy)
    return pair_set(f"tfds/{name}", Images(records, image_key, bad=bad), captions)

  return when_scored(records, lambda record: _captions_in(record, caption_key), read)


def captions_of(records: Sequence[Any], caption_key: str) -> tuple[list[list[str]], dict[int, str]]:
  """Returns the captions of each record, and, by the number of a record, why it has none."""
  return answers(records, lambda record: _captions_in(record, caption_key), [])


def _captions_in(record: Mapping[str, Any], caption_key: str) -> list[str]:
  texts = [text for text in read_texts(record[caption_key]) if text.strip()]
  if not texts:
    raise DecodeError("the record has no caption")
  return texts


def default_data_dir() -> str:
  """Returns the directory in which TFDS keeps its sets unless told otherwise."""
  return os.environ.get("TFDS_DATA_DIR") or str(pathlib.Path.home() / "tensorflow_datasets")
