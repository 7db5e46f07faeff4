"""Tars of webdataset and img2dataset: files of one name in a row are a sample, `a/0001.jpg` with `a/0001.txt`."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any

from contrastive_jax.errors import UserError, nearest
from contrastive_jax.preprocess import formats
from contrastive_jax.preprocess.decoding import DecodeError
from data.sources.scan import DamagedFile, Found, LeftOut, Place

_BLOCK = tarfile.BLOCKSIZE
_JSON = "json"

Members = dict[str, tuple[Place, bytes]]


def scan(stream: BufferedReader, image_key: str, fields: frozenset[str]) -> Iterator[Found | LeftOut]:
  """Yields the samples of a tar; see `scan.Scan`.

  The fields of a sample are the ends of its files behind the first dot, such as "txt", and the keys in its "json".
  """
  for key, members in _samples(stream):
    if members is None:
      yield LeftOut(key, "two files of one name")
      continue
    pictures = [end for end in members if f".{end.rpartition('.')[2]}" in formats.suffixes()]
    chosen = image_key or (pictures[0] if len(pictures) == 1 else "")
    if len(pictures) > 1 and not image_key:
      raise UserError(f"sample {key!r} has the pictures {', '.join(pictures)}: name one with --image_key")
    if chosen not in members:
      yield LeftOut(key, f"no {image_key}{nearest(image_key, members)}" if image_key else "no picture")
      continue
    place, picture = members.pop(chosen)
    try:
      said = _said(members, fields)
    except DecodeError as error:
      yield LeftOut(key, str(error))
    else:
      yield Found(key, picture, place, said)


def _samples(stream: BufferedReader) -> Iterator[tuple[str, Members | None]]:
  """Yields the files of each sample by the ends of their names; None for a sample with two files of one end."""
  current: str | None = None
  members: Members | None = {}
  for name, place, data in _files(stream):
    folder, slash, base = name.rpartition("/")
    stem, dot, end = base.partition(".")
    if not dot or not stem or base.startswith("._"):
      continue  # A file without an end belongs to no sample; "._a.jpg" is what a Mac adds to "a.jpg".
    key = folder + slash + stem
    if key != current:
      if current is not None:
        yield current, members
      current, members = key, {}
    end = end.lower()
    if members is not None:
      members = None if end in members else {**members, end: (place, data)}
  if current is not None:
    yield current, members


def _files(stream: BufferedReader) -> Iterator[tuple[str, Place, bytes]]:
  """Yields name, place and bytes of each file of a tar, of which every header and the end have to be there.

  Python's own loop takes a damaged header for the end of the tar.
  """
  size = stream.seek(0, 2)
  stream.seek(0)
  try:
    archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - the stream is the caller's.
  except tarfile.TarError as error:
    packed = " and packed" if _is_packed(stream) else ""
    raise DamagedFile(f"it is no tar{packed} ({error})") from error
  member = archive.firstmember
  while member is not None:
    if member.isfile():
      if member.issparse():
        raise DamagedFile(f"{member.name!r} is a sparse file: write the tar without --sparse")
      if member.offset_data + member.size > size:
        raise DamagedFile(f"it is cut within {member.name!r}, at byte {size:,}")
      stream.seek(member.offset_data)
      yield member.name, Place(member.offset_data, member.size), stream.read(member.size)
    at = archive.offset
    try:
      stream.seek(at)
      member = tarfile.TarInfo.fromtarfile(archive)
    except tarfile.EOFHeaderError:
      member = None
    except tarfile.EmptyHeaderError:
      raise DamagedFile(f"it is cut at byte {size:,}: the mark of its end is missing") from None
    except tarfile.TarError as error:
      raise DamagedFile(f"it is damaged at byte {at:,} ({error})") from error
  stream.seek(archive.offset)
  while rest := stream.read(1 << 20):
    if rest.count(0) != len(rest):
      raise DamagedFile(f"more follows the mark of its end at byte {archive.offset:,}: tars cannot be joined with cat")


def _is_packed(stream: BufferedReader) -> bool:
  stream.seek(0)
  return stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _said(members: Members, fields: frozenset[str]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for end, (_, data) in members.items():
    if end == _JSON:
      values = _object(data)
      twice = next((name for name in values if name in fields and name in members), None)
      if twice is not None:
        raise DecodeError(f"{twice!r} is a file and a key of its json")
      found |= {name: value for name, value in values.items() if name in fields}
    elif end in fields:
      found[end] = _text(data, end)
  return found


def _object(data: bytes) -> Mapping[str, Any]:
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    raise DecodeError("a json that cannot be read") from None
  if not isinstance(value, dict):
    raise DecodeError("a json that is no object")
  return value


def _text(data: bytes, end: str) -> str:
  try:
    return data.decode("utf-8-sig").strip()
  except UnicodeDecodeError:
    raise DecodeError(f"a {end} that is not UTF-8") from None
