"""Builds the index of a set in shards, of pictures that tell their number by their grey level."""

import concurrent.futures
import io
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
