"""Sets in shards on servers: the samples are those of the same files on this machine, whatever the server does."""

import concurrent.futures
import pickle

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from data.files import Files
from data.sources.indexed import IndexedSource, files_of
from tests.data import in_shards
from tests.flaky_server import FAULTS, FlakyServer

pytestmark = [pytest.mark.slow, pytest.mark.extra]
shards = in_shards.shards
NAME = "{000..003}.tar"


@pytest.fixture(scope="module")
def contents(shards):
  return {path.relative_to(shards).as_posix(): path.read_bytes() for path in shards.rglob("*") if path.is_file()}


def quick(tmp_path, **options):
  return Files(cache_dir=tmp_path / "cache", answer_seconds=0.5, delays=(0.01,) * 12, **options)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_server_that_fails_in_every_way_changes_no_sample(shards, contents, tmp_path, cache_bytes):
  local = IndexedSource("webdataset", f"{shards}/{NAME}", caption_key="caption")
  with FlakyServer(contents, FAULTS, rate=0.3, seed=1) as server:
    reader = quick(tmp_path, cache_bytes=cache_bytes)
    source = IndexedSource("webdataset", server.address(NAME), caption_key="caption", reader=reader)
    assert len(source) == len(local) == in_shards.COUNT
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      for _ in range(2):
        for k, example in enumerate(pool.map(source.__getitem__, range(len(source)))):
          np.testing.assert_array_equal(example.image, local[k].image)
          assert example.text.captions == local.text(k).captions
    asked = len(server.requests)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3].image, local[3].image)
    assert sum(server.failed.values()) > 10
    assert cache_bytes == 0 or len(server.requests) - asked <= 6  # The cache has the picture.


def test_a_file_that_changes_on_its_server_ends_the_run_by_name(contents, tmp_path):
  with FlakyServer(contents) as server:
    source = IndexedSource("webdataset", server.address(NAME), reader=quick(tmp_path))
    server.files["001.tar"] = bytes(len(contents["001.tar"]))
    with pytest.raises(UserError, match=r"001\.tar"):
      source[13]


def test_an_index_of_files_on_a_server_is_that_of_the_same_files_here(shards, contents, tmp_path):
  with FlakyServer(contents, FAULTS[:2], rate=0.2, seed=2) as server:
    named = server.address(NAME)
    assert files_of("webdataset", named, quick(tmp_path)) == [server.address(f"{k:03d}.tar") for k in range(4)]
    built = in_shards.build("webdataset", named, output=tmp_path / "index")
    assert built.rows == in_shards.COUNT
    source = IndexedSource("webdataset", named, index=str(built.folder), reader=quick(tmp_path))
    for k in (0, 17, 39):
      np.testing.assert_array_equal(source[k].image, in_shards.pixels(k))
