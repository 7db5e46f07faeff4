"""What patterns name is there, reads give exactly the bytes that were asked for, and a cache keeps what it promises."""

import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from data.files import Facts, Files, cache
from data.files.cache import RangeCache
from data.files.reader import DESCRIPTORS
from data.files.tally import Tally


@pytest.fixture
def shards(tmp_path, monkeypatch):
  """Empty files, and the current directory below which they lie."""
  monkeypatch.chdir(tmp_path)
  for name in [*(f"a/{k:03d}.tar" for k in range(12)), "b/x.tar", "b/y.tar", "b/z.txt", "b/[1].tar", "b/{x,y}.bin"]:
    os.makedirs(os.path.dirname(name), exist_ok=True)
    open(name, "w").close()
  os.makedirs("b/folder.tar")
  return tmp_path


@pytest.mark.parametrize(
  ("pattern", "names"),
  [
    ("a/000.tar", ["a/000.tar"]),
    ("./a//000.tar", ["a/000.tar"]),
    ("a/{000..011}.tar", [f"a/{k:03d}.tar" for k in range(12)]),
    ("a/{011..000}.tar", [f"a/{k:03d}.tar" for k in range(12)]),
    ("a/{000..011..5}.tar", ["a/000.tar", "a/005.tar", "a/010.tar"]),
    ("{b/y,a/000,b/x,b/y}.tar", ["a/000.tar", "b/x.tar", "b/y.tar"]),
    ("a/00{1,{4..6}}.tar", ["a/001.tar", "a/004.tar", "a/005.tar", "a/006.tar"]),
    ("a/*1.tar", ["a/001.tar", "a/011.tar"]),
    ("a/01[01].tar", ["a/010.tar", "a/011.tar"]),
    ("b/*.tar", ["b/[1].tar", "b/x.tar", "b/y.tar"]),
    ("{b/?.tar,b/x.*,a/00[12].tar}", ["a/001.tar", "a/002.tar", "b/x.tar", "b/y.tar"]),
    ("b/[1].tar", ["b/[1].tar"]),
    ("b/{x,y}.bin", ["b/{x,y}.bin"]),
    (r"b/\{x,y\}.bin", ["b/{x,y}.bin"]),
  ],
)
def test_a_pattern_names_its_files_sorted_and_each_once(shards, pattern, names):
  assert Files().expand(pattern) == names
  assert Files().expand(f"{shards}/{pattern}") == sorted(os.path.join(shards, name) for name in names)


@pytest.mark.parametrize(
  ("pattern", "said"),
  [
    ("a/{000..013}.tar", r"^data.x=a/\{000..013\}.tar names 14 files, and 2 of them are not there, .* a/012.tar: "),
    ("a/{010..012}.tar", "names 3 files, and one of them is not there, the first being a/012.tar"),
    ("b/{x,gone}.tar", "names 2 files, and one of them is not there, the first being b/gone.tar"),
    ("a/000.tar/more", "one of them is not there"),
    ("c/*.tar", r"none fits c/\*.tar"),
    ("{b/*.tar,c/*.tar}", r"none fits c/\*.tar"),
    ("b/f*.tar", "none fits"),
    ("b", r"b is a folder, and files are needed: name those in it, such as b/\*"),
    ("b/folder.tar/", "is a folder"),
    ("a/{0..99999999}.tar", "more than 10,000,000 files"),
    ("", "^data.x='' is empty"),
    ("hdfs://host/a.tar", "hdfs://host/a.tar is an address of the kind hdfs://"),
    ("http://host/*.tar", "HTTP servers give no lists"),
    ("s3://bucket/{a,b}/", "s3://bucket/a/ is a folder or a bucket"),
    ("gs://bucket", "gs://bucket is a folder or a bucket"),
  ],
)
def test_a_pattern_that_does_not_name_files_is_one_sentence(shards, pattern, said):
  with pytest.raises(UserError, match=said) as refused:
    Files().expand(pattern, "data.x")
  assert len(str(refused.value).splitlines()) == 1


def test_a_link_that_leads_nowhere_is_a_missing_file(shards):
  os.symlink("nowhere", "b/w.tar")
  with pytest.raises(UserError, match=r"one of them is not there, the first being b/w.tar"):
    Files().expand("b/*.tar")


def test_the_facts_of_a_file_change_when_it_does(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"123")
  before = Files().facts(str(path))
  assert before == Files().facts(str(path)) == Facts(3, str(os.stat(path).st_mtime_ns))
  path.write_bytes(b"456")
  os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
  assert Files().facts(str(path)) not in (before, Facts(4, before.stamp))
  with pytest.raises(FileNotFoundError):
    Files().facts(str(tmp_path / "gone"))


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
  """Files of random bytes, more than are open at once."""
  folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
  contents = {str(folder / f"{k}.bin"): rng.bytes(int(rng.integers(1, 5000))) for k in range(DESCRIPTORS + 72)}
  for file, content in contents.items():
    with open(file, "wb") as written:
      written.write(content)
  return contents


def reads(contents, seed, count):
  """Files and ranges within them, empty ones too."""
  rng, names = np.random.default_rng(seed), list(contents)
  for _ in range(count):
    name = names[rng.integers(len(names))]
    start, stop = sorted(rng.integers(0, len(contents[name]) + 1, 2).tolist())
    yield name, start, stop - start


def test_threads_read_exactly_their_bytes_from_few_descriptors(contents):
  files, before = Files(), len(os.listdir("/proc/self/fd"))

  def wrong(seed):
    return [
      (name, offset, size)
      for name, offset, size in reads(contents, seed, 500)
      if files.read(name, offset, size) != contents[name][offset : offset + size]
    ]

  with ThreadPoolExecutor(8) as pool:
    assert not any(pool.map(wrong, range(8)))
  assert len(os.listdir("/proc/self/fd")) - before <= DESCRIPTORS
  del files, wrong
  assert len(os.listdir("/proc/self/fd")) == before


def test_ranges_come_in_the_order_in_which_they_were_asked(contents):
  name, content = max(contents.items(), key=lambda each: len(each[1]))
  ranges = [(40, 10), (0, 0), (0, 10), (45, 100), (40, 10), (len(content), 0), (len(content) - 1, 1)]
  assert Files().read_many(name, ranges) == [content[offset : offset + size] for offset, size in ranges]


def test_a_file_that_ends_too_early_is_named(tmp_path):
  path = tmp_path / "cut.tar"
  path.write_bytes(bytes(100))
  for offset, size in [(90, 11), (100, 1), (10**12, 5)]:
    with pytest.raises(UserError, match=rf"{path} has 100 bytes, and bytes up to {offset + size:,} are asked of it"):
      Files().read(str(path), offset, size)
  for offset, size in [(-1, 5), (0, -1)]:
    with pytest.raises(ValueError, match="neither can be negative"):
      Files().read(str(path), offset, size)
  with pytest.raises(FileNotFoundError):
    Files().read(str(tmp_path / "gone"), 0, 1)


def test_a_file_of_this_machine_is_opened_as_it_is_and_its_own_copy(tmp_path, contents):
  name, content = next(iter(contents.items()))
  with Files().opened(name) as stream:
    assert stream.read(7) + stream.read() == content
  assert str(Files(cache_dir=tmp_path / "cache").local_copy(name)) == name and not list(tmp_path.iterdir())


def test_a_pickled_reader_reads(tmp_path, contents):
  name, content = next(iter(contents.items()))
  files = Files(cache_bytes=1 << 20, cache_dir=tmp_path)
  files.read(name, 0, 1)
  again = pickle.loads(pickle.dumps(files))
  assert again.read(name, 0, len(content)) == content


@pytest.mark.parametrize("address", ["s3://bucket/a.tar", "gs://bucket/a.tar", "https://host/a.tar"])
def test_a_missing_package_is_one_sentence(address, monkeypatch):
  package = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}[address.partition(":")[0]]
  module = {"s3fs": "s3fs.core", "gcsfs": "gcsfs.core", "aiohttp": "fsspec.implementations.http"}[package]
  monkeypatch.setitem(sys.modules, module, None)  # As Python itself marks what cannot be imported.
  with pytest.raises(UserError, match=rf"^files at .*{address[:5]}.* need the package {package} \(") as said:
    Files().read(address, 0, 1)
  assert str(said.value).endswith("run pip install -r requirements-remote.txt")
  assert len(str(said.value).splitlines()) == 1


def on_disk(folder):
  """Bytes of all files below a folder, as the disk gives them out in blocks, but for the counts of the cache itself."""
  paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".total"]
  return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths)


def test_the_cache_drops_what_was_used_least_recently_and_never_holds_more(tmp_path):
  """An entry of a page takes two blocks with its checksum, so that eight entries fill the cache."""
  entries = {str(k): np.random.default_rng(k).bytes(4096) for k in range(12)}
  ranges, used = RangeCache(tmp_path, 8 * 8192), []
  for key in np.random.default_rng(0).integers(0, 12, 400).astype(str).tolist():
    found = ranges.get(key, 4096)
    assert found == (entries[key] if key in used else None)
    if found is None:
      assert ranges.put(key, entries[key])
    used = [*(each for each in used if each != key), key][-8:]
    assert on_disk(tmp_path) <= 8 * 8192
  assert not ranges.put("large", bytes(8 * 8192)) and ranges.get("large", 8 * 8192) is None


def test_a_cache_of_several_drawers_never_holds_more_either(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, "_DRAWER_BYTES", 64 << 10)
  ranges, size = RangeCache(tmp_path, 256 << 10), 24 << 10
  for k in range(40):
    assert ranges.put(str(k), bytes([k]) * size)
    assert on_disk(tmp_path) <= 256 << 10
  assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"0000", "0001", "0002", "0003"}
  kept = [k for k in range(40) if ranges.get(str(k), size) == bytes([k]) * size]
  assert len(kept) == 8 and 39 in kept
  RangeCache(tmp_path, 64 << 10)  # The drawers that a smaller one does not have go.
  assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"0000"}


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "empty"])
def test_a_damaged_entry_is_not_there_and_can_be_put_again(tmp_path, damage):
  ranges, content = RangeCache(tmp_path, 1 << 20), np.random.default_rng(0).bytes(1000)
  ranges.put("key", content)
  (path,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".total"]
  stored = path.read_bytes()
  damaged = {"cut": stored[:-1], "longer": stored + b"x", "flipped": stored[:500] + b"?" + stored[501:], "empty": b""}
  path.write_bytes(damaged[damage])
  assert ranges.get("key", 1000) is None and not path.exists()
  assert ranges.put("key", content) and ranges.get("key", 1000) == content
  assert ranges.get("other", 1000) is None and ranges.get("key", 999) is None


def test_a_cache_that_cannot_be_written_keeps_nothing_and_hurts_nobody(tmp_path):
  ranges = RangeCache(tmp_path / "cache", 1 << 20)
  (tmp_path / "cache" / "0000").write_text("in the way of a drawer")
  assert not ranges.put("key", b"content") and ranges.get("key", 7) is None


def test_a_cache_that_cannot_be_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"^data.cache_bytes=-1 is negative"):
    Files(cache_bytes=-1)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"^data.cache_dir=.* is a file"):
    Files(cache_bytes=1, cache_dir=tmp_path / "file")


def test_counts_of_threads_add_up():
  tally = Tally()
  threads = [threading.Thread(target=lambda: [tally.add("x", 2) for _ in range(1000)]) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert tally.total() == {"x": 16_000}
