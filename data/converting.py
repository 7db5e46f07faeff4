"""Converts any set of pictures with captions to tars of webdataset, whose samples are read by offset.

Each tar holds as many samples of the set, in its order, so that what is in a tar depends on nothing but the request:
tars are written by any number of processes, or by a cluster, and those that are there are kept when a command goes on.

A sample is `000000012.jpg` with `000000012.txt`, its caption, or `000000012.json`, which holds several under "caption".
"""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from contrastive_jax import bad_records, runs
from contrastive_jax.bad_records import BadRecord, BadRecords, retried
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import formats
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.preprocess.images import decode, straight
from data import executors, indexing, shared_source
from data.sources.features import distinct
from data.sources.indexed import GROUP, index_folder
from data.sources.pictures import StoredPictures
from data.substitution import shard_of

VERSION = 1
# What a folder of tars says of itself, and the folder of what is needed until all of them are written.
ABOUT, _WORK, _SOURCE = "convert.json", ".convert", "source.pickle"
_TXT, _CAPTION = "txt", "caption"
# Samples that are read, evenly spread, to know how many make a tar of the wanted size.
_GLANCE = 256
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = frozenset("*?[]{}")


class Shard(NamedTuple):
  """A tar that was written: its samples, its bytes, and number, name, file and fault of each that was left out."""

  rows: int
  size: int
  left_out: list[tuple[int, str, str, str]]


class Converted(NamedTuple):
  """The outcome of `convert`: name of the set that was written, its tars, samples, and samples that were left out."""

  name: str
  shards: int
  rows: int
  left_out: int


def convert(
  source: StoredPictures,
  folder: Path,
  executor: concurrent.futures.Executor,
  *,
  shard_bytes: int = 1 << 28,
  check: bool = True,
  asked: Mapping[str, str] | None = None,
) -> Converted:
  """Writes a set as tars with an index, or goes on with writing it.

  Args:
    source: the set.
    folder: the folder of the tars. Workers on other machines have to see it under the same path.
    executor: what runs `write_shard`, such as a pool of processes or that of a Dask client.
    shard_bytes: bytes of a tar, about: each holds as many samples as have that size on average.
    check: whether each picture is decoded, and left out where it cannot be; otherwise its header has to be sound.
    asked: what else the request is known by, such as the name of the set and its options.

  Raises:
    UserError: if no sample can be read, or the folder holds something else.
    OSError: if a sample cannot be read after several attempts, or the disk is full.
  """
  folder = folder.absolute()
  if magic := _MAGIC.intersection(os.fspath(folder)):
    raise UserError(f"{folder} has {min(magic)!r} in its path, which stands for several files in a name: rename it")
  about = {"version": VERSION, **(asked or {}), "check": check, "shard_bytes": shard_bytes, **_glance(source, check)}
  about["samples_per_shard"] = max(1, shard_bytes // about.pop("mean_bytes"))
  done = folder / ABOUT
  if done.is_file():
    return _finished(folder, about)
  work = folder / _WORK
  _begin(folder, work, about, source)
  count, step = len(source), about["samples_per_shard"]
  numbers = range(-(-count // step))
  missing = [number for number in numbers if not _is_there(folder, work, number)]
  arguments = {k: (os.fspath(work), k, k * step, min(count, (k + 1) * step), check) for k in missing}
  for number, shard in executors.each(executor, write_shard, arguments, "shards", "converting"):
    runs.write_object(_about_of(work, number), shard._asdict())
  shards = [_written(work, number) for number in numbers]
  rows, left_out = sum(shard.rows for shard in shards), [each for shard in shards for each in shard.left_out]
  if not rows:
    raise UserError(f"{source.name}: none of {count:,} samples can be read, the first since {left_out[0][-1]}")
  named = f"{folder}/*.tar"
  columns = (GROUP,) if source.shares_groups else ()
  wanted = indexing.Wanted("webdataset", texts=(_TXT, _CAPTION), columns=columns)
  built = indexing.build(
    wanted, [os.fspath(folder / _file(number)) for number in numbers], Path(index_folder(named)), executor
  )
  if built.rows != rows:
    raise UserError(
      f"{folder} holds {built.rows:,} samples that can be indexed, and {rows:,} were written: delete it and convert"
      " again"
    )
  _name_bad(source, folder, left_out)
  about["shards"] = [{"rows": shard.rows, "size": shard.size} for shard in shards]
  runs.write_object(done, {**about, "rows": rows, "left_out": len(left_out)})
  shutil.rmtree(work)
  return Converted(f"webdataset/{named}", len(shards), rows, len(left_out))


def write_shard(work: str, number: int, start: int, stop: int, check: bool) -> Shard:
  """Writes samples `start` to `stop` of the set that lies in the working folder; runs in a process of its own."""
  source = shared_source.read(Path(work) / _SOURCE)
  target = Path(work).parent / _file(number)
  partial = Path(work) / f"{target.name}.{uuid.uuid4().hex}.partial"
  rows, left_out = 0, []
  try:
    with _named(target):
      with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(start, stop):
          file = shard_of(source, index)
          try:
            with _named(file or source.name):
              members = retried(lambda index=index: _members(source, index, check))
          except DecodeError as error:
            left_out.append((index, source.sample_name(index), file, str(error)[:300]))
            continue
          rows += 1
          for end, data in members.items():
            info = tarfile.TarInfo(f"{index:09d}.{end}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
      with partial.open("rb") as written:
        os.fsync(written.fileno())
      size = partial.stat().st_size
      partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)
  return Shard(rows, size, left_out)


@contextlib.contextmanager
def _named(file: str | os.PathLike) -> Iterator[None]:
  """Gives an error of the file system the name of the file, where it has none."""
  try:
    yield
  except OSError as error:
    if error.filename or error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(file)) from error


def _members(source: StoredPictures, index: int, check: bool) -> dict[str, bytes]:
  """Returns the files of a sample by the ends of their names."""
  text = source.text(index)
  stored = source.stored(index)
  if not isinstance(stored, bytes):
    out = io.BytesIO()
    Image.fromarray(straight(stored)).save(out, "PNG")
    stored = out.getvalue()
  elif check:
    decode(stored, None)
  suffix = formats.suffix_of(stored)
  if not suffix:
    raise DecodeError(formats.remedy(stored) or "not a picture that can be decoded here")
  captions = distinct(text.captions)
  if not captions:
    raise DecodeError("it has no caption")
  said: dict[str, Any] = {GROUP: text.group} if source.shares_groups else {}
  plain = {}
  # Who reads a txt takes blanks and the mark of an encoding away from it.
  if len(captions) == 1 and captions[0] == captions[0].strip() and not captions[0].startswith("\ufeff"):
    plain[_TXT] = captions[0].encode()
  else:
    said[_CAPTION] = captions
  if said:
    plain["json"] = json.dumps(said, ensure_ascii=False).encode()
  return {suffix[1:]: stored, **plain}


def _glance(source: StoredPictures, check: bool) -> dict[str, Any]:
  """Reads a few samples; returns how many bytes one takes in a tar, and by what the set is known again."""
  count = len(source)
  sizes, known, fault = [], hashlib.sha256(), ""
  for index in range(0, count, max(1, -(-count // _GLANCE))):
    known.update(repr((index, source.sample_name(index))).encode())
    try:
      members = retried(lambda index=index: _members(source, index, check))
    except DecodeError as error:
      fault = fault or str(error)
      continue
    sizes.append(sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in members.values()))
    for end, data in members.items():
      known.update(repr((end, len(data), zlib.crc32(data))).encode())
  if not sizes:
    raise UserError(f"{source.name}: none of the samples that were looked at can be read, the first since {fault}")
  return {"samples": count, "known_by": known.hexdigest(), "mean_bytes": -(-sum(sizes) // len(sizes))}


def _begin(folder: Path, work: Path, about: Mapping[str, Any], source: StoredPictures) -> None:
  """Makes the working folder, or goes on in that of the same request."""
  request = work / "request.json"
  if request.is_file():
    _require_equal(folder, runs.read_object(request), about)
    for left_over in work.glob("*.partial"):
      left_over.unlink(missing_ok=True)
    return
  if folder.is_dir() and (other := min(folder.glob("*.tar"), default=None)):
    raise UserError(f"{folder} holds {other.name} already: name a folder without tars")
  work.mkdir(parents=True, exist_ok=True)
  shared_source.write(source, work / _SOURCE)
  runs.write_object(request, about)


def _require_equal(folder: Path, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  for name, value in runs.sealed(about).items():
    if name == "digest" or before.get(name) == value:
      continue
    if name == "known_by":
      raise UserError(f"{folder} holds tars of samples that have changed since: delete it, or name another folder")
    raise UserError(
      f"{folder} holds tars that were written with {name}={before.get(name)!r}, and now it is {value!r}: give the same"
      " again, or name another folder"
    )


def _finished(folder: Path, about: Mapping[str, Any]) -> Converted:
  """Returns what was converted before, once it is seen to be there."""
  before = runs.read_object(folder / ABOUT)
  _require_equal(folder, before, about)
  for number, shard in enumerate(before["shards"]):
    path = folder / _file(number)
    if not path.is_file() or path.stat().st_size != shard["size"]:
      raise UserError(f"{path} is missing or has changed since it was written: delete {folder} and convert again")
  shutil.rmtree(folder / _WORK, ignore_errors=True)
  return Converted(f"webdataset/{folder}/*.tar", len(before["shards"]), before["rows"], before["left_out"])


def _is_there(folder: Path, work: Path, number: int) -> bool:
  path = folder / _file(number)
  return path.is_file() and _about_of(work, number).is_file() and path.stat().st_size == _written(work, number).size


def _written(work: Path, number: int) -> Shard:
  told = runs.read_object(_about_of(work, number))
  return Shard(told["rows"], told["size"], [tuple(each) for each in told["left_out"]])


def _name_bad(source: StoredPictures, folder: Path, left_out: list[tuple[int, str, str, str]]) -> None:
  listed = folder / bad_records.FILE
  listed.unlink(missing_ok=True)
  ledger = BadRecords(listed)
  for index, name, shard, why in left_out:
    reason = why if name == str(index) else f"{name}: {why}"
    ledger.add(BadRecord(source.name, index, reason, shard=shard, use="conversion"))


def _file(number: int) -> str:
  return f"{number:06d}.tar"


def _about_of(work: Path, number: int) -> Path:
  return work / f"{number:06d}.json"
