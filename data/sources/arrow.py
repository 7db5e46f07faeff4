"""Pictures and texts in tables of Arrow, as Hugging Face's datasets writes them and as others do."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from contrastive_jax.errors import UserError, nearest
from data.sources.scan import Found, LeftOut, Place

# What a picture is stored as beside plain bytes: its bytes and the path that it had.
_BYTES = "bytes"


class Columns:
  """What the columns of a table hold.

  Attributes:
    image_key: column of the picture.
    read: columns that are read: that of the picture and those that are asked for.
  """

  def __init__(self, schema: pa.Schema, image_key: str, fields: frozenset[str]):
    """Finds the column of the picture.

    Args:
      schema: the schema of the table. What Hugging Face's datasets says in it names classes.
      image_key: column of the picture; "" is the only one that holds pictures.
      fields: columns that are asked for.

    Raises:
      UserError: if no column or several hold pictures, or `image_key` does not.
    """
    features = _features(schema)
    self.image_key = image_key or _only_picture(schema, features)
    if self.image_key not in schema.names or not _holds_pictures(schema.field(self.image_key).type):
      known = nearest(self.image_key, schema.names)
      raise UserError(f"no column {self.image_key!r} holds the bytes of pictures{known}: name one with --image_key")
    self.read = [self.image_key, *(name for name in schema.names if name in fields and name != self.image_key)]
    self._classes = {
      name: feature["names"]
      for name, feature in features.items()
      if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in self.read
    }

  def rows(self, batch: pa.RecordBatch | pa.Table, start: int) -> Iterator[Found | LeftOut]:
    """Yields the rows of a part of the table, of which `start` is the number of the first.

    The place of each is its row for an offset, which a format that knows the place of the bytes replaces.
    """
    columns = {name: batch.column(name).to_pylist() for name in self.read}
    pictures = columns.pop(self.image_key)
    for k, stored in enumerate(pictures):
      picture = stored.get(_BYTES) if isinstance(stored, dict) else stored
      if not picture:
        has_path = isinstance(stored, dict) and stored.get("path")
        yield LeftOut(str(start + k), "a path in place of the bytes of its picture" if has_path else "no picture")
        continue
      said = {name: self._named(name, values[k]) for name, values in columns.items()}
      yield Found(str(start + k), picture, Place(start + k, len(picture)), said)

  def _named(self, name: str, value: Any) -> Any:
    """Returns the name of a class in place of its number."""
    classes = self._classes.get(name)
    if classes is None or value is None:
      return value
    return classes[value] if 0 <= value < len(classes) else None


def bytes_of(column: pa.Array | pa.ChunkedArray, row: int) -> bytes:
  """Returns the bytes of the picture in a row of a column of pictures."""
  stored = column[row].as_py()
  return stored[_BYTES] if isinstance(stored, dict) else stored


def _features(schema: pa.Schema) -> Mapping[str, Any]:
  """Returns what Hugging Face's datasets says of the columns, by their names; nothing where another wrote the table."""
  try:
    return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
  except (TypeError, KeyError, ValueError):
    return {}


def _holds_pictures(kind: pa.DataType) -> bool:
  if pa.types.is_struct(kind):
    return any(kind.field(k).name == _BYTES and _holds_pictures(kind.field(k).type) for k in range(kind.num_fields))
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _only_picture(schema: pa.Schema, features: Mapping[str, Any]) -> str:
  told = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]
  found = [name for name in told if name in schema.names] or [
    field.name for field in schema if _holds_pictures(field.type)
  ]
  if len(found) != 1:
    what = f"the columns {', '.join(found)} hold" if found else f"no column of {', '.join(schema.names)} holds"
    raise UserError(f"{what} the bytes of pictures: name one with --image_key")
  return found[0]
