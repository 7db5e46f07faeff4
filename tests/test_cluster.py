"""Commands over a Dask cluster give what they give without one, also when a worker is killed while it works."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import runs

pytestmark = [pytest.mark.slow, pytest.mark.extra]
COUNT = 120
SMALL = "--shard_bytes=1_500_000"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Pictures of noise, large enough that a cluster has some work with them."""
  pytest.importorskip("distributed")
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for number in range(COUNT):
    pixels = rng.integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    (folder / f"{number:03d}.txt").write_text(f"photo {number}")
  return folder


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
  """The tars that this machine's processes write, and their index."""
  folder = tmp_path_factory.mktemp("plain") / "out"
  module("data.convert", f"folder/{photos}", folder, SMALL, "--processes=1")
  return folder


def begin(name, *arguments, **options):
  return runs.start("-m", name, *map(str, arguments), **options)


def module(name, *arguments, expected=0):
  return runs.finish(begin(name, *arguments), expected)


class Cluster:
  """A scheduler and two workers, each a process without another that would start it again."""

  def __init__(self, folder, start, environment):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    port = self.address.rpartition(":")[2]
    self._start, self._log = start, folder
    # Compiled as the commands are, since the same bits are asked of both.
    compiled = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": runs.QUICKLY_COMPILED}
    self._environment = {**os.environ, **compiled, **environment}
    self.scheduler = self.dask("scheduler", "--host=127.0.0.1", f"--port={port}", "--no-dashboard")
    self.workers = [self.worker() for _ in range(2)]

  def dask(self, what, *arguments):
    command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
    log = (self._log / f"{what}.log").open("ab")
    return self._start(command, cwd=runs.ROOT, stdout=log, stderr=log, env=self._environment)

  def worker(self):
    quiet = ("--nthreads=1", "--no-nanny", "--no-dashboard", "--death-timeout=60")
    return self.dask("worker", self.address, *quiet, f"--local-directory={self._log}")


@pytest.fixture
def started(tmp_path):
  """Starts a cluster, with settings of its own."""
  with contextlib.ExitStack() as stack:

    def start(command, **options):
      process = subprocess.Popen(command, **options)
      stack.callback(process.wait)
      stack.callback(process.kill)
      return process

    (tmp_path / "dask").mkdir()
    yield lambda **environment: Cluster(tmp_path / "dask", start, environment)


@pytest.fixture
def cluster(started):
  return started()


def until(happened, process):
  deadline = time.monotonic() + 120
  while not happened():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()
    time.sleep(0.01)


def index_of(folder):
  """Returns what the parts of an index hold, whose names are drawn, and what is said of them."""
  about = json.loads((folder / "index.json").read_text())
  for file in about["files"]:
    file.pop("stamp", None)  # The time at which it was written.
  parts = [(folder / part.pop("file")).read_bytes() for part in about["parts"]]
  return parts, {key: value for key, value in about.items() if key != "digest"}


def tars(folder):
  return {path.name: path.read_bytes() for path in Path(folder).glob("*.tar")}


def test_a_killed_worker_changes_nothing(photos, plain, cluster, tmp_path):
  out = tmp_path / "out"
  converting = begin("data.convert", f"folder/{photos}", out, SMALL, f"--scheduler={cluster.address}")
  until(lambda: len(tars(out)) >= 2, converting)
  cluster.workers[0].send_signal(signal.SIGKILL)
  assert f"holds {COUNT} samples" in runs.finish(converting)
  assert tars(out) == tars(plain) and len(tars(out)) > 4
  assert index_of(out / "all.tar.index") == index_of(plain / "all.tar.index")
  assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in plain.iterdir())
  cluster.worker()
  indexing = begin("data.index", f"webdataset/{out}/*.tar", f"--output={out}/again.index",
                   f"--scheduler={cluster.address}", "--texts=txt,caption")  # fmt: skip
  until(lambda: len(list(out.glob("again.index/pieces/*"))) >= 2, indexing)
  cluster.workers[1].send_signal(signal.SIGKILL)
  assert f"indexes {COUNT:,} samples" in runs.finish(indexing)
  assert index_of(out / "again.index") == index_of(plain / "all.tar.index")


def test_a_killed_worker_changes_no_embedding(photos, cluster, tmp_path):
  workdir = tmp_path / "run"
  runs.train(workdir, "--config.total_steps=5")
  asked = (f"--workdir={workdir}", f"--source=folder/{photos}", "--shard_rows=6", "--batch_size=6")
  runs.run("embed.py", *asked, f"--output={tmp_path / 'plain'}")
  out = tmp_path / "out"
  embedding = runs.start("embed.py", *asked, f"--output={out}", f"--scheduler={cluster.address}")
  until(lambda: len(list(out.glob("*.parquet"))) >= 4, embedding)
  cluster.workers[0].send_signal(signal.SIGKILL)
  assert f"{out} holds {COUNT} embeddings" in runs.finish(embedding)
  names = sorted(file.name for file in out.iterdir())
  assert names == sorted(file.name for file in (tmp_path / "plain").iterdir()) and len(names) == COUNT // 6
  for name in names:
    ours, plain = (pq.read_table(folder / name) for folder in (out, tmp_path / "plain"))
    assert ours["id"].to_pylist() == plain["id"].to_pylist() and ours.schema.metadata == plain.schema.metadata
    np.testing.assert_array_equal(*(np.array(table["embedding"].to_pylist()) for table in (ours, plain)))


def test_a_lost_scheduler_is_one_sentence_and_the_command_goes_on(photos, plain, cluster, tmp_path):
  out = tmp_path / "out"
  converting = begin("data.convert", f"folder/{photos}", out, SMALL, f"--scheduler={cluster.address}")
  until(lambda: len(tars(out)) >= 2, converting)
  cluster.scheduler.send_signal(signal.SIGKILL)
  said = runs.finish(converting, expected=2)
  last = said.strip().splitlines()[-1]
  assert f"convert.py: the scheduler {cluster.address} was lost or stopped: start it and its workers again" in last
  assert "Traceback" not in said
  module("data.convert", f"folder/{photos}", out, SMALL)
  assert tars(out) == tars(plain)


def test_work_that_kills_its_workers_is_one_sentence_and_the_command_goes_on(photos, plain, started, tmp_path):
  # Of a worker that dies Dask blames the work that it had, and gives it up once it was blamed more often than this.
  cluster = started(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
  out = tmp_path / "out"
  converting = begin("data.convert", f"folder/{photos}", out, SMALL, f"--scheduler={cluster.address}")
  until(lambda: len(tars(out)) >= 2, converting)
  cluster.workers[0].send_signal(signal.SIGKILL)
  said = runs.finish(converting, expected=2)
  assert f"convert.py: workers of {cluster.address} died again and again over one part" in said
  assert "it goes on with what is left" in said and "Traceback" not in said
  module("data.convert", f"folder/{photos}", out, SMALL)
  assert tars(out) == tars(plain)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_tar_by_half_and_goes_on(photos, plain, tmp_path, number):
  out = tmp_path / "out"
  converting = begin("data.convert", f"folder/{photos}", out, SMALL, "--processes=2", start_new_session=True)
  until(lambda: len(tars(out)) >= 2, converting)
  if number == signal.SIGKILL:
    converting.send_signal(number)  # Its workers end by themselves, and the pipe that they share with it then too.
  else:
    os.killpg(converting.pid, number)  # As a terminal and a scheduler of jobs do.
  said, _ = converting.communicate(timeout=60)
  assert "Traceback" not in said
  if number == signal.SIGINT:
    assert converting.returncode == 130 and "convert.py: interrupted" in said
  left = tars(out)
  assert left.items() <= tars(plain).items() and len(left) < len(tars(plain))
  assert not (out / "convert.json").exists()
  module("data.convert", f"folder/{photos}", out, SMALL, "--processes=2")
  assert tars(out) == tars(plain) and sorted(os.listdir(out)) == sorted(os.listdir(plain))
