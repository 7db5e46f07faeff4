"""Checks of texts, classes, templates and images that callers pass, so that a wrong type is an error, not a result."""

import array
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import DecodeError
from contrastive_jax.preprocess.video import Clip

_ONE = (str, bytes, bytearray, memoryview, array.array, os.PathLike, Image.Image, Clip)
# How much of a wrong value an error shows.
_SHOWN = 60


def texts(values: Any, field: str = "texts") -> list[str]:
  """Returns texts as a list, in the order of their positions.

  Args:
    values: list, tuple, one-dimensional array, pandas Series or iterator of strings. A Series is read by position,
      whatever its index is.
    field: name of the argument in errors.

  Raises:
    UserError: if this is one text, has no order, or holds anything but strings that UTF-8 can encode.
  """
  items = list(_ordered(values, field, "texts"))
  for index, item in enumerate(items):
    if not isinstance(item, str):
      remedy = "decode it first" if isinstance(item, bytes) else "pass strings, and leave out what is missing"
      raise UserError(f"{field}[{index}] is {_said(item)}, not a string: {remedy}")
    try:
      item.encode()
    except UnicodeEncodeError as error:
      code = f"U+{ord(item[error.start]):04X}"
      raise UserError(
        f"{field}[{index}] holds the lone surrogate {code}, which no text has: decode its source again as UTF-8"
      ) from None
  # Not by `str(item)`, which is the name of a member of an Enum and not its text.
  return [str.__str__(item) for item in items]


def class_names(values: Any, field: str = "classes", *, least: int = 2, distinct: bool = True) -> list[str]:
  """Returns class names as a list.

  Args:
    values: the names, as `texts` takes them.
    field: name of the argument in errors.
    least: the fewest classes that make sense; with one class every probability would be 1.
    distinct: whether equal names are refused, since they share the probability of one class between them.

  Raises:
    UserError: if these are no texts, too few, empty, or not distinct.
  """
  names = texts(values, field)
  if len(names) < least:
    raise UserError(f"{field} has {len(names)} names: pass at least {least}")
  _no_blank(names, field)
  if distinct:
    _no_duplicate(names, field)
  return names


def templates(values: Any, field: str = "templates", *, distinct: bool = True) -> list[str]:
  """Returns prompt templates as a list.

  Args:
    values: the templates, as `texts` takes them; each holds `{}` exactly once and no other brace.
    field: name of the argument in errors.
    distinct: whether equal templates are refused, since they would count twice in the mean.

  Raises:
    UserError: if these are no texts, none at all, or one has not exactly one place for the class name.
  """
  prompts = texts(values, field)
  if not prompts:
    raise UserError(f"{field} is empty: pass prompts such as 'a photo of a {{}}.'")
  for index, prompt in enumerate(prompts):
    rest = prompt.replace("{}", "", 1)
    if rest == prompt or "{" in rest or "}" in rest:
      raise UserError(
        f"{field}[{index}] is {_said(prompt)}: write {{}} exactly once, where the class name belongs, "
        f"and no other brace, such as 'a photo of a {{}}.'"
      )
  if distinct:
    _no_duplicate(prompts, field)
  return prompts


def images(values: Any, field: str = "images") -> Any:
  """Returns images as something with a length and positions; no picture is read yet.

  Args:
    values: list, tuple, array with images along its first axis, pandas Series, iterator, or anything else with a length
      and an index. An iterator is read to its end, and its images are held in memory.
    field: name of the argument in errors.

  Raises:
    UserError: if this is one image or has no order.
  """
  dims = getattr(values, "ndim", None)
  if dims in (2, 3) and not hasattr(values, "iloc"):
    raise UserError(f"{field} takes a list of images, got one {type(values).__name__}{_shape(values)}: write [image]")
  return _ordered(values, field, "images")


def image(item: Any, index: int, field: str = "images") -> Any:
  """Returns an image or clip as the decoder takes it: arrays of other libraries become NumPy arrays.

  Args:
    item: a path, the bytes of a file, a PIL image, a clip, or a uint8 array.
    index: position of the image, for errors.
    field: name of the argument in errors.

  Raises:
    UserError: if the type, dtype or shape is none of an image.
  """
  where = f"{field}[{index}]"
  if isinstance(item, bytearray | memoryview):
    return bytes(item)
  if isinstance(item, _ONE) and not isinstance(item, array.array):
    return item
  if isinstance(item, Mapping):
    raise UserError(f"{where} is a {type(item).__name__} with the keys {', '.join(map(str, item))}: pass its image")
  if callable(getattr(item, "read", None)):
    raise UserError(f"{where} is an open file ({type(item).__name__}): pass its path or its bytes, which read() gives")
  if not hasattr(item, "__array__") or getattr(item, "ndim", 1) == 0:
    raise UserError(f"{where} is {_said(item)}: pass a path, a PIL image or a uint8 array [height, width, 3]")
  if isinstance(item, np.ma.MaskedArray):
    raise UserError(f"{where} is an array with a mask, which no model sees: pass the pixels, such as image.filled(0)")
  try:
    pixels = np.asarray(item)
  except Exception as error:  # Arrays of other libraries raise what they like.
    reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
    raise UserError(
      f"{where} cannot become a NumPy array on this host ({reason}): pass uint8 pixels in the memory of the CPU"
    ) from error
  if np.issubdtype(pixels.dtype, np.floating) or pixels.dtype.name == "bfloat16":
    raise UserError(
      f"{where} is {pixels.dtype.name}{list(pixels.shape)}, whose scale is unknown: pass uint8 pixels from 0 to 255, "
      f"such as (255 * image).round().astype('uint8') for pixels from 0 to 1"
    )
  if pixels.dtype == np.dtype(np.uint16).newbyteorder():
    pixels = pixels.astype(np.uint16)  # As files of 16-bit pictures have them.
  if pixels.dtype not in (np.uint8, np.uint16) or (pixels.dtype == np.uint16 and pixels.ndim == 4):
    raise UserError(f"{where} is {pixels.dtype.name}{list(pixels.shape)}: pass uint8 pixels from 0 to 255")
  channels = pixels.shape[-1] if pixels.ndim > 2 else 1
  if pixels.ndim not in (2, 3, 4) or not pixels.size or channels not in ((3, 4) if pixels.ndim == 4 else (1, 3, 4)):
    remedy = "pass [height, width, 3 or 4], or [frames, height, width, 3 or 4] for a clip"
    if pixels.ndim == 3 and pixels.size and pixels.shape[0] in (1, 3, 4) and pixels.shape[-1] > 2:
      remedy = "its channels come first, move them last with transpose(1, 2, 0)"
    raise UserError(f"{where} has the shape {list(pixels.shape)}: {remedy}")
  return pixels


def decode_error(error: Exception, item: Any, index: int, field: str = "images") -> DecodeError:
  """Returns the error of a picture that cannot be decoded, which names its position and its path."""
  where = f"{field}[{index}]"
  if isinstance(item, str | os.PathLike):
    where += f" ({os.fspath(item)!r})"
  # Pillow names the buffer that it reads, which says nothing to a caller.
  reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
  return DecodeError(f"{where}: {reason}")


def read_error(error: OSError, index: int, field: str = "images") -> OSError:
  """Returns the error of a file that cannot be read, of the same kind, which names its position too."""
  if error.errno is None:
    return error
  return OSError(error.errno, f"{field}[{index}]: {error.strerror}", error.filename)


def _ordered(values: Any, field: str, what: str) -> Any:
  if isinstance(values, _ONE):
    raise UserError(f"{field} takes a list of {what}, got one {type(values).__name__}: write [{_brief(values)}]")
  if isinstance(values, Mapping | Set):
    raise UserError(f"{field} takes a list of {what}, got a {type(values).__name__}: pass a list in the order you want")
  if isinstance(values, type) and not isinstance(values, Iterable):
    raise UserError(f"{field} takes a list of {what}, got the class {values.__name__}")
  dims = getattr(values, "ndim", 1)
  if dims == 0 or (dims != 1 and (what == "texts" or hasattr(values, "iloc"))):
    raise UserError(
      f"{field} takes a list of {what}, got a {type(values).__name__}{_shape(values)}: pass one column of it"
    )
  if hasattr(values, "iloc"):
    # A Series looks up labels where a list looks up positions; it is iterated in the order of its positions.
    return list(values)
  if callable(getattr(values, "to_pylist", None)):
    return values.to_pylist()  # Columns of Arrow give scalars of their own, which are no strings.
  if hasattr(values, "__len__") and hasattr(values, "__getitem__"):
    return values
  if isinstance(values, Iterator | Iterable):
    try:
      walk = iter(values)
    except TypeError:  # What pandas calls `Series.str` looks like an iterable and is none.
      raise UserError(f"{field} takes a list of {what}, got {_said(values)}") from None
    return list(walk)
  raise UserError(f"{field} takes a list of {what}, got {_said(values)}")


def _no_blank(values: Sequence[str], field: str) -> None:
  for index, value in enumerate(values):
    if not value.strip():
      raise UserError(f"{field}[{index}] is empty: pass a name")


def _no_duplicate(values: Sequence[str], field: str) -> None:
  first: dict[str, int] = {}
  for index, value in enumerate(values):
    # Tokenizers make one text of what differs in spaces alone, and people cannot tell two ways to write an accent.
    same = unicodedata.normalize("NFC", " ".join(value.split()))
    if first.setdefault(same, index) != index:
      raise UserError(f"{field}[{first[same]}] and {field}[{index}] are both {_said(value)}: leave one of them out")


def _said(value: Any) -> str:
  return "None" if value is None else f"the {type(value).__name__} {_brief(value)}"


def _brief(value: Any) -> str:
  if isinstance(value, Image.Image | Clip):
    return "image"
  shown = " ".join(ascii(value).split())
  return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def _shape(values: Any) -> str:
  shape = getattr(values, "shape", None)
  return "" if shape is None else f" of shape {list(shape)}"
