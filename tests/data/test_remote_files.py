"""Files of servers, which fail in every way: the bytes are those of the file, or there is an error that says why not.

S3 and Google Cloud Storage are played by servers that others wrote, and HTTP by one that fails on purpose.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from data.files import Files, reader
from data.files.reader import BLOCK, NEAR
from tests import runs
from tests.flaky_server import FAULTS, FlakyServer

pytestmark = [pytest.mark.slow, pytest.mark.extra]

CONTENTS = {
  f"shard-{k:03d}.tar": np.random.default_rng(k).bytes(size) for k, size in enumerate((300_000, 0, 1, 70_000))
}
# Read with a block boundary inside.
LARGE = np.random.default_rng(9).bytes(2 * BLOCK + 12_345)


@pytest.fixture(scope="module")
def environment():
  with pytest.MonkeyPatch.context() as patch:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "AWS_PROFILE"):
      patch.delenv(name, raising=False)
    yield patch


@pytest.fixture(scope="module")
def s3(environment):
  """Puts a file into a bucket of a server of moto; yields (address of the bucket, put, remove)."""
  # Here and below not at the top: worker processes import this file too, and these take seconds.
  import boto3
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer("127.0.0.1", 0)
  server.start()
  host, port = server.get_host_and_port()
  environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
  for name, value in {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
    environment.setenv(f"AWS_{name}", value)
  client = boto3.client("s3")
  client.create_bucket(Bucket="bucket")
  yield (
    "s3://bucket",
    lambda name, content: client.put_object(Bucket="bucket", Key=name, Body=content),
    lambda name: client.delete_object(Bucket="bucket", Key=name),
  )
  server.stop()


@pytest.fixture(scope="module")
def gs(environment):
  """The same of the emulator of Google Cloud Storage."""
  from gcp_storage_emulator.server import create_server

  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
  server.start()
  environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
  environment.setitem(fsspec.config.conf, "gcs", {"token": "anon"})

  def send(method, path, content=None, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers, method=method)
    urllib.request.urlopen(request).close()

  def put(name, content):
    if content:
      send("POST", f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", content)
    else:  # Which the emulator takes in parts alone.
      parts = f'--x\r\nContent-Type: application/json\r\n\r\n{{"name": "{name}"}}\r\n--x\r\n\r\n\r\n--x--'.encode()
      kind = {"Content-Type": "multipart/related; boundary=x"}
      send("POST", "/upload/storage/v1/b/bucket/o?uploadType=multipart", parts, **kind)

  yield (
    "gs://bucket",
    put,
    lambda name: send("DELETE", f"/storage/v1/b/bucket/o/{name}"),
  )
  server.stop()


@pytest.fixture(scope="module")
def http(environment):
  """The same of a server without faults."""
  with FlakyServer({}) as server:
    yield server.address("").rstrip("/"), server.files.__setitem__, server.files.pop


@pytest.fixture(params=["s3", "gs", "http"])
def place(request):
  """A server with `CONTENTS`; (its address, put, remove)."""
  place = request.getfixturevalue(request.param)
  for name, content in CONTENTS.items():
    place[1](name, content)
  return place


def quick(**options):
  return Files(answer_seconds=5.0, delays=(0.01, 0.02, 0.04, 0.08, 0.16), **options)


def test_every_range_of_a_file_is_its_bytes(place):
  address, *_ = place
  files, rng = quick(), np.random.default_rng(0)
  for name, content in CONTENTS.items():
    file = f"{address}/{name}"
    facts = files.facts(file)
    assert facts.size == len(content)
    assert facts.stamp or not content  # HTTP has no place for it in the answer that a file is empty.
    assert files.read(file, 0, len(content)) == content
    ranges = [sorted(rng.integers(0, len(content) + 1, 2).tolist()) for _ in range(20)]
    ranges = [(start, stop - start) for start, stop in ranges]
    assert files.read_many(file, ranges) == [content[offset : offset + size] for offset, size in ranges]
    assert [files.read(file, *each) for each in ranges] == [content[offset : offset + size] for offset, size in ranges]


def test_a_large_file_is_read_front_to_back_and_copied(place, tmp_path):
  address, put, _ = place
  put("large.arrow", LARGE)
  files, file = quick(cache_dir=tmp_path), f"{address}/large.arrow"
  with files.opened(file) as stream:
    parts = []
    while part := stream.read(1_000_003):
      parts.append(part)
    assert b"".join(parts) == LARGE
    assert stream.seek(-5, os.SEEK_END) == len(LARGE) - 5 and stream.read() == LARGE[-5:]
    assert stream.seek(BLOCK - 3) and stream.read(6) == LARGE[BLOCK - 3 : BLOCK + 3]
  with files.opened(file) as stream:
    assert stream.read() == LARGE
  copy = files.local_copy(file)
  assert copy.read_bytes() == LARGE and copy.suffix == ".arrow" and copy.is_relative_to(tmp_path)
  requests = files.tally.total()["requests"]
  assert files.local_copy(file) == copy and files.tally.total()["requests"] == requests + 1  # For the facts alone.
  put("large.arrow", LARGE[::-1])
  again = files.local_copy(file)
  assert again != copy and again.read_bytes() == LARGE[::-1]


def test_patterns_name_what_is_there(place):
  address, *_ = place
  files, names = quick(), [f"{address}/{name}" for name in CONTENTS]
  assert files.expand(f"{address}/shard-{{003..000}}.tar") == names
  with pytest.raises(UserError, match=r"names 6 files, and 2 of them are not there, .* being .*/shard-004.tar: "):
    files.expand(f"{address}/shard-{{000..005}}.tar")
  if address.startswith("http"):
    with pytest.raises(UserError, match="name them in braces"):
      files.expand(f"{address}/*.tar")
  else:
    assert files.expand(f"{address}/shard-*.tar") == names
    assert files.expand(f"{address}/shard-{{*1,00?}}.tar") == names
    with pytest.raises(UserError, match="none fits"):
      files.expand(f"{address}/no-*.tar")


def test_what_cannot_be_is_refused_at_once(place):
  address, *_ = place
  files = Files()  # With delays that would be noticed.
  started = time.monotonic()
  for ask in (lambda file: files.read(file, 0, 1), files.facts, files.opened, files.local_copy):
    with pytest.raises(FileNotFoundError, match="gone"):
      ask(f"{address}/gone")
  with pytest.raises(UserError, match=r"shard-002.tar has 1 bytes, and bytes up to 2 are asked"):
    files.read(f"{address}/shard-002.tar", 0, 2)
  with pytest.raises(UserError, match=r"shard-002.tar (has 1 bytes|does not have the bytes)"):
    files.read(f"{address}/shard-002.tar", 5, 2)
  assert time.monotonic() - started < 5


def test_a_changed_file_is_never_mixed_with_what_it_was(place, tmp_path):
  """Within a run it is an error, and a later one reads what is there."""
  address, put, _ = place
  file, before, after = f"{address}/changing.tar", bytes(1000), b"\1" * 1000
  put("changing.tar", before)
  files = quick(cache_bytes=1 << 20, cache_dir=tmp_path)
  assert files.read(file, 0, 10) == before[:10]
  time.sleep(0.01)
  put("changing.tar", after)
  if not address.startswith("gs"):  # Whose emulator takes no notice of the generation that is asked for.
    with pytest.raises(UserError, match="has changed or is gone"):
      files.read(file, 20, 10)
  assert quick(cache_bytes=1 << 20, cache_dir=tmp_path).read(file, 0, 10) == after[:10]


def test_the_cache_spares_requests_and_notices_damage(http, tmp_path):
  address, put, _ = http
  put("cached.tar", LARGE)
  file, ranges = f"{address}/cached.tar", [(k * 100_000, 1000) for k in range(10)]
  expected = [LARGE[offset : offset + size] for offset, size in ranges]
  for _ in range(2):
    files = quick(cache_bytes=1 << 20, cache_dir=tmp_path)
    assert files.read_many(file, ranges) == expected
  assert files.tally.total() == {"requests": 1, "hits": 10}
  entries = [path for path in (tmp_path / "ranges").rglob("*") if path.is_file() and not path.name.startswith(".")]
  for path in entries[:3]:
    path.write_bytes(path.read_bytes()[:-1] + b"?")
  files = quick(cache_bytes=1 << 20, cache_dir=tmp_path)
  assert [files.read(file, *each) for each in ranges] == expected
  assert files.tally.total() == {"requests": 4, "hits": 7, "misses": 3, "bytes": 3000}


def test_near_ranges_are_asked_for_at_once(environment, monkeypatch):
  with FlakyServer({"a": LARGE}) as server:
    ranges = [(NEAR * 10, 5), (0, 10), (NEAR + 9, 1), (5, 10), (NEAR * 3, 7)]
    found = quick().read_many(server.address("a"), ranges)
    assert found == [LARGE[offset : offset + size] for offset, size in ranges]
    spans = [f"bytes=0-{NEAR + 9}", f"bytes={NEAR * 3}-{NEAR * 3 + 6}", f"bytes={NEAR * 10}-{NEAR * 10 + 4}"]
    assert [asked for _, asked in server.requests] == spans
    monkeypatch.setattr(reader, "MOST_AT_ONCE", 100)
    ranges, server.requests = [(k * 40, 40) for k in range(5)], []
    assert quick().read_many(server.address("a"), ranges) == [LARGE[k * 40 : (k + 1) * 40] for k in range(5)]
    assert [asked for _, asked in server.requests] == ["bytes=0-79", "bytes=80-159", "bytes=160-199"]


@pytest.mark.parametrize("fault", [*FAULTS, "all"])
def test_faults_are_met_by_further_attempts_and_never_seen_in_the_bytes(environment, fault):
  faults = FAULTS if fault == "all" else [fault]
  with FlakyServer({"a": LARGE[:200_000]}, faults, rate=0.2, seed=1) as server:
    files, file = Files(answer_seconds=0.5, delays=(0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1)), server.address("a")

    def wrong(seed):
      starts = np.random.default_rng(seed).integers(0, 190_000, 12).tolist()
      return [start for start in starts if files.read(file, start, 10_000) != LARGE[start : start + 10_000]]

    with ThreadPoolExecutor(4) as pool:
      assert not any(pool.map(wrong, range(4)))
    tally = files.tally.total()
    assert sum(server.failed.values()) > 3
    assert tally["requests"] == len(server.requests) == 48 + sum(server.failed.values())
    with files.opened(file) as stream:
      assert stream.read() == LARGE[:200_000]


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    ("503", r"/a cannot be read, after 3 attempts \(HTTP 503\)"),
    ("stalls", r"after 3 attempts \(http://127.0.0.1:\d+ did not answer within 0.50\d* s\)"),
    ("stalls halfway", r"did not answer within"),
    ("resets", "after 3 attempts"),
    ("cuts", "after 3 attempts"),
    ("cuts unsaid", r"gave 500 bytes of the 1000 that were asked"),
    ("ignores Range", r"answers with whole files where parts are asked"),
    ("other bytes", r"was asked for 1000 bytes from 3 on and answers with 'bytes 2-1001/2000'"),
  ],
)
def test_a_server_that_always_fails_is_named_after_a_stated_time(environment, fault, said):
  with FlakyServer({"a": bytes(2000)}, [fault], rate=1.0) as server:
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
      Files(answer_seconds=0.5, delays=(0.05, 0.1)).read(server.address("a"), 3, 1000)
    assert time.monotonic() - started < 4
    assert len(server.requests) == 3
  with pytest.raises(UserError, match="after 2 attempts"):  # Nobody is there any more.
    Files(answer_seconds=0.5, delays=(0.05,)).read(server.address("a"), 3, 1000)


def _read_all(files, file, seed, sent):
  starts = np.random.default_rng(seed).integers(0, 190_000, 30).tolist()
  sent.send([start for start in starts if files.read(file, start, 10_000) != LARGE[start : start + 10_000]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_share_a_cache_while_their_parent_reads_on(environment, tmp_path, method):
  """The cache is too small for all, so that entries come and go under everybody's hands."""
  with FlakyServer({"a": LARGE[:200_000]}, ["503", "cuts"], rate=0.05) as server:
    files, file = quick(cache_bytes=400_000, cache_dir=tmp_path), server.address("a")
    stop, wrong = threading.Event(), []

    def go_on():
      rng = np.random.default_rng(0)
      while not stop.wait(0.002):
        start = int(rng.integers(0, 190_000))
        if files.read(file, start, 10_000) != LARGE[start : start + 10_000]:
          wrong.append(start)

    reading = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in reading:
      thread.start()
    context, answers = multiprocessing.get_context(method), []
    for seed in range(3):
      received, sent = context.Pipe(duplex=False)
      worker = context.Process(target=_read_all, args=(files, file, seed, sent))
      worker.start()
      answers.append((worker, received))
    for worker, received in answers:
      assert received.poll(60) and received.recv() == []
      worker.join(30)
      assert worker.exitcode == 0
    stop.set()
    for thread in reading:
      thread.join(30)
      assert not thread.is_alive()
    assert not wrong
  held = [path.stat().st_size for path in Path(tmp_path).rglob("*") if path.is_file() and path.name != ".total"]
  assert 0 < sum(held) <= 400_000


_FORKS_EARLY = """
import multiprocessing, sys, threading, time
from data.files import Files

class Slowly:
  def find_spec(self, name, path, target=None):
    if name == "fsspec.implementations.http":
      time.sleep(1)

sys.meta_path.insert(0, Slowly())
reading = Files().read, (sys.argv[1], 0, 1)
threading.Thread(target=reading[0], args=reading[1]).start()
time.sleep(0.3)
child = multiprocessing.get_context("fork").Process(target=reading[0], args=reading[1], daemon=True)
child.start()
child.join(20)
sys.exit(child.exitcode != 0)
"""


def test_a_child_that_is_forked_while_its_parent_imports_a_client_reads_too(http):
  """The lock of a module that is being imported stays locked for ever in the child."""
  address, put, _ = http
  put("a", b"content")
  subprocess.run([sys.executable, "-c", _FORKS_EARLY, f"{address}/a"], check=True, cwd=runs.ROOT, timeout=60)


def test_one_process_copies_a_file_for_all(http, tmp_path):
  address, put, _ = http
  put("index.arrow", LARGE)
  with ThreadPoolExecutor(4) as pool:
    readers = [quick(cache_dir=tmp_path) for _ in range(4)]
    copies = set(pool.map(lambda files: files.local_copy(f"{address}/index.arrow"), readers))
  assert len(copies) == 1 and copies.pop().read_bytes() == LARGE
  assert sum(files.tally.total()["bytes"] for files in readers) == len(LARGE)
