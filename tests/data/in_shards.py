"""Sets in shards of pictures that tell their number by their grey level, and what builds their index."""

import concurrent.futures
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data import indexing
from data.files import Files
from data.sources.formats import FORMATS
from data.sources.indexed import files_of, index_folder

COUNT, A_SHARD = 40, 12


class Here(concurrent.futures.Executor):
  """Runs what is submitted at once, in this process."""

  def submit(self, function, /, *arguments, **options):
    future = concurrent.futures.Future()
    try:
      future.set_result(function(*arguments, **options))
    except Exception as error:
      future.set_exception(error)
    return future


def build(kind, named, output="", **options):
  how = {name: options.pop(name) for name in ("skip_damaged", "joins") if name in options}
  texts = options.pop("texts", FORMATS[kind].texts)
  wanted = indexing.Wanted(kind, texts=tuple(texts), **options)
  folder = Path(output or index_folder(str(named)))
  return indexing.build(wanted, files_of(kind, str(named), Files()), folder, Here(), **how)


def pixels(number):
  return np.full((4 + number, 6, 3), number, np.uint8)


def png(number):
  out = io.BytesIO()
  Image.fromarray(pixels(number)).save(out, "PNG")
  return out.getvalue()


def proto(number, data):
  """Writes a field of a protocol buffer that holds bytes, by the rules of the wire format."""
  length, varint = len(data), b""
  while True:
    length, low = length >> 7, length & 127
    varint += bytes([low | (128 if length else 0)])
    if not length:
      return bytes([number << 3 | 2]) + varint + data


def example(**features):
  def of(value):
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], bytes):
      return proto(1, b"".join(proto(1, each) for each in values))
    if isinstance(values[0], float):
      return proto(2, proto(1, struct.pack(f"<{len(values)}f", *values)))
    return proto(3, b"".join(bytes([8, each]) for each in values))

  entries = (proto(1, proto(1, key.encode()) + proto(2, of(value))) for key, value in features.items())
  return proto(1, b"".join(entries))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
  """Tars by webdataset's own writer; picture k has k as its grey level."""
  folder = tmp_path_factory.mktemp("shards")
  with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=A_SHARD, verbose=0) as writer:
    for k in range(COUNT):
      said = {"similarity": k / COUNT, "caption": [f"it says {k}", f"also {k}"], "nsfw": k % 2 == 0}
      sample = {"__key__": f"{k:05d}", "png": png(k), "txt": f"picture {k}\n", "json": said}
      writer.write(sample)
  build("webdataset", f"{folder}/{{000..003}}.tar", columns=("similarity", "nsfw"))
  return folder
