"""TFRecord files of `tf.train.Example`, read without TensorFlow."""

import functools
import struct
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess import formats
from data.sources.scan import DamagedFile, Found, LeftOut, Place

_LENGTH, _CRC = struct.Struct("<Q"), struct.Struct("<I")
# Where a record holds pixels, their shape stands in features of these names, with the same folder before them.
_SHAPE = ("height", "width", "channels")
_PICTURES = ("image", "image/encoded", "image_raw", "image/raw", "jpg", "jpeg", "png", "webp", "image_bytes")
_MOST_BYTES = 1 << 30


def scan(stream: BufferedReader, image_key: str, fields: frozenset[str]) -> Iterator[Found | LeftOut]:
  """Yields the records of a file; see `scan.Scan`. The fields are the features of the examples."""
  for number, (start, record) in enumerate(_records(stream)):
    key = str(number)
    features = _features(record)
    if features is None:
      yield LeftOut(key, "no tf.train.Example")
      continue
    image_key = image_key or _picture_key(features, number)
    value = _value(features[image_key]) if image_key in features else None
    if isinstance(value, list) or not isinstance(value, bytes) or not value:
      known = nearest(image_key, features)
      if number == 0:
        raise UserError(f"record 0 has no picture in {image_key!r}{known}: name its feature with --image_key")
      yield LeftOut(key, f"no picture in {image_key!r}")
      continue
    # The first place that holds these bytes will do, whichever feature it is of.
    place = Place(start + record.index(value), len(value))
    said = {name: _value(features[name]) for name in features if name in fields and name != image_key}
    yield Found(key, value, place, said, _raw_shape(features, image_key, len(value)))


def _records(stream: BufferedReader) -> Iterator[tuple[int, bytes]]:
  """Yields the start and the bytes of each record, of which both checksums have to agree."""
  at = 0
  while head := stream.read(12):
    if len(head) < 12:
      raise DamagedFile(f"it is cut at byte {at + len(head):,}")
    _check(head[:8], head[8:], at)
    length = _LENGTH.unpack(head[:8])[0]
    if length > _MOST_BYTES:
      raise DamagedFile(f"its record at byte {at:,} has {length:,} bytes, more than {_MOST_BYTES:,}")
    record, tail = stream.read(length), stream.read(4)
    if len(record) < length or len(tail) < 4:
      raise DamagedFile(f"it is cut within the record at byte {at:,}")
    _check(record, tail, at)
    yield at + 12, record
    at += 16 + length


def _check(data: bytes, stored: bytes, at: int) -> None:
  crc = google_crc32c.value(data)
  # TFRecord's way to store a checksum of what may hold checksums itself.
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  if masked != _CRC.unpack(stored)[0]:
    raise DamagedFile(f"a checksum differs in the record at byte {at:,}, or it is no TFRecord")


def _features(record: bytes) -> dict[str, Any] | None:
  try:
    return dict(_example().FromString(record).features.feature)
  except message.DecodeError:
    return None


def _value(feature: Any) -> Any:
  """Returns the value of a feature, the list of its values if these are several, and None if there is none."""
  kind = feature.WhichOneof("kind")
  values = list(getattr(feature, kind).value) if kind else []
  return values[0] if len(values) == 1 else values or None


def _picture_key(features: dict[str, Any], number: int) -> str:
  holds = {name: _value(feature) for name, feature in features.items()}
  found = [name for name, value in holds.items() if isinstance(value, bytes) and formats.size_of(value)]
  found = found or [name for name in _PICTURES if name in holds and _raw_shape(features, name, len(holds[name] or b""))]
  if len(found) != 1:
    what = f"the pictures {', '.join(sorted(found))}" if found else f"no picture among {', '.join(sorted(holds))}"
    raise UserError(f"record {number} has {what}: name the feature of the picture with --image_key")
  return found[0]


def _raw_shape(features: dict[str, Any], image_key: str, size: int) -> tuple[int, int, int] | None:
  """Returns height, width and channels where features beside the picture tell them and its bytes are so many."""
  folder, slash, _ = image_key.rpartition("/")
  beside = [_value(features[name]) if (name := folder + slash + part) in features else None for part in _SHAPE]
  height, width, channels = (each if isinstance(each, int) else None for each in beside)
  if not height or not width or height < 0 or width < 0:
    return None
  channels = channels or size // (height * width)
  return (height, width, channels) if channels in (1, 3, 4) and height * width * channels == size else None


@functools.cache
def _example() -> type[message.Message]:
  """Returns the class of `tf.train.Example`, whose schema is part of no package that is needed here."""
  file = descriptor_pb2.FileDescriptorProto(name="contrastive_jax/example.proto", package="contrastive_jax")
  file.syntax = "proto3"
  field = descriptor_pb2.FieldDescriptorProto

  def add(name: str, *parts: tuple[str, int, int, int, str]) -> descriptor_pb2.DescriptorProto:
    made = file.message_type.add(name=name)
    for part, number, kind, label, of in parts:
      made.field.add(name=part, number=number, type=kind, label=label, type_name=of or None)
    return made

  for name, kind in (
    ("BytesList", field.TYPE_BYTES),
    ("FloatList", field.TYPE_FLOAT),
    ("Int64List", field.TYPE_INT64),
  ):
    add(name, ("value", 1, kind, field.LABEL_REPEATED, ""))
  lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
  feature = add(
    "Feature",
    *(
      (name, number, field.TYPE_MESSAGE, field.LABEL_OPTIONAL, f".contrastive_jax.{of}")
      for number, (name, of) in enumerate(lists, 1)
    ),
  )
  feature.oneof_decl.add(name="kind")
  for part in feature.field:
    part.oneof_index = 0
  features = add(
    "Features", ("feature", 1, field.TYPE_MESSAGE, field.LABEL_REPEATED, ".contrastive_jax.Features.FeatureEntry")
  )
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
  entry.field.add(
    name="value",
    number=2,
    type=field.TYPE_MESSAGE,
    label=field.LABEL_OPTIONAL,
    type_name=".contrastive_jax.Feature",
  )
  add("Example", ("features", 1, field.TYPE_MESSAGE, field.LABEL_OPTIONAL, ".contrastive_jax.Features"))
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("contrastive_jax.Example"))
