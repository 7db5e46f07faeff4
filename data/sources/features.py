"""What the features of a TFDS set hold, and how pictures and texts are read from their values."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode
from data.sources.frames import StoredFrames


def is_image(feature: Any, features: Any) -> bool:
  """Says whether a feature is stored as TFDS stores images, which may show distances or classes of pixels."""
  return isinstance(getattr(feature, "feature", feature), features.Image)


def is_picture(feature: Any, features: Any) -> bool:
  """Says whether a feature shows colours or grey levels, and not the bytes of a float32 in the channels of a PNG."""
  if not is_image(feature, features):
    return False
  image = getattr(feature, "feature", feature)
  return not isinstance(image, features.LabeledImage) and image.np_dtype in (np.uint8, np.uint16)


def holds_pictures(feature: Any, features: Any) -> bool:
  """Says whether a feature holds pictures, clips, the bytes of files, or the uint8 or uint16 pixels of pictures."""
  if is_picture(feature, features):
    return True
  if not isinstance(feature, features.Tensor) or isinstance(feature, features.Text | features.ClassLabel):
    return False
  shape, dtype = feature.shape, feature.np_dtype
  if not shape:
    return _is_string(dtype)  # The bytes of a file.
  return dtype in (np.uint8, np.uint16) and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4)))


def holds_text(feature: Any) -> bool:
  """Says whether a feature holds a text or a sequence of texts, perhaps under the key "text" or under the only key."""
  if hasattr(feature, "items"):
    parts = dict(feature.items())  # As `read_texts` reads them.
    return _has_one(parts) and holds_text(parts.get("text") or next(iter(parts.values())))
  if hasattr(feature, "feature"):
    return holds_text(feature.feature)
  return _is_string(getattr(feature, "np_dtype", None)) and not hasattr(feature, "encoding_format")


def _has_one(parts: Mapping[Any, Any]) -> bool:
  """Says whether it is clear which of several parts is the caption."""
  return "text" in parts or len(parts) == 1


def _is_string(dtype: Any) -> bool:
  return dtype is not None and np.dtype(dtype).kind in "OSU"


def described(feature: Any) -> str:
  """Describes a feature in one line, for errors."""
  return " ".join(repr(feature).split())


def read_picture(stored: Any, background: tuple[int, int, int] | None) -> np.ndarray | StoredFrames:
  """Reads the value of a feature that holds pictures or clips.

  Args:
    stored: the value: the bytes of a file, pixels, or the bytes of the frames of a clip.
    background: the colour behind transparent pixels; None keeps their alpha channel.

  Raises:
    DecodeError: if there is none, or it cannot be decoded.
  """
  if isinstance(stored, bytes):
    return decode(stored, background)
  if isinstance(stored, np.ndarray) and stored.dtype.kind != "O":
    return decode(stored, background)
  if stored is None:
    raise DecodeError("the record has no picture")
  if not len(stored):
    raise DecodeError("the clip has no frames")
  return StoredFrames(list(stored))


def distinct(texts: Iterable[str]) -> list[str]:
  """Returns the texts that are not blank, each once and in their order.

  Examples:
    >>> distinct(["a dog", " ", "a cat", "a dog"])
    ['a dog', 'a cat']
  """
  return list(dict.fromkeys(text for text in texts if text.strip()))


def read_texts(value: Any) -> list[str]:
  """Reads one caption or several, stored as bytes or strings, alone, under the key "text" or under the only key."""
  if isinstance(value, Mapping):
    if not _has_one(value):
      raise DecodeError(f"its caption has the keys {', '.join(map(str, value))}, where one of them should be text")
    value = value["text"] if "text" in value else next(iter(value.values()))
  items = list(value.reshape(-1)) if isinstance(value, np.ndarray) else value
  items = list(items) if isinstance(items, list | tuple) else [items]
  if not all(isinstance(item, str | bytes) for item in items):
    raise DecodeError("a caption is no text")
  try:
    texts = [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in items]
    for text in texts:
      text.encode("utf-8")  # A lone surrogate is no text, and ends tokenizers and files that meet it later.
  except UnicodeError as error:
    raise DecodeError(f"a caption is not UTF-8 ({error})") from error
  return texts
