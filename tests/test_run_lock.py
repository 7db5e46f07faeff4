"""One run a directory: the second is refused by name, and a dead one does not stand in the way."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from contrastive_jax import run_lock
from contrastive_jax.errors import SaveError, UserError
from contrastive_jax.run_lock import RunLock
from tests import runs

ELSEWHERE = {"host": "node7", "pid": 1, "start": "5", "boot": "another", "since": "2024-01-01 00:00:00", "token": "t"}


def test_the_second_is_told_who_holds_the_directory_and_it_is_free_afterwards(tmp_path):
  said = rf"in use by process {os.getpid()} on \S+ since 2"
  with RunLock(tmp_path / "run"), pytest.raises(UserError, match=said), RunLock(tmp_path / "run"):
    pass
  assert not (tmp_path / "run").exists()
  with RunLock(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_is_followed_at_once(tmp_path):
  code = "import sys, time, pathlib\nfrom contrastive_jax.run_lock import RunLock\n"
  code += "with RunLock(pathlib.Path(sys.argv[1])):\n  print('held', flush=True)\n  time.sleep(60)"
  with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} "), RunLock(tmp_path):
      pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  assert (tmp_path / run_lock.NAME).exists()
  with RunLock(tmp_path):
    pass


@pytest.fixture
def impatient(monkeypatch):
  """Heartbeats, and what is taken for their absence, a hundred times faster."""
  monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.1)
  monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.6)
  monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.01)
  monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.05)


@pytest.mark.parametrize("flock", [True, None])
@pytest.mark.parametrize("silent", [0, 0.3, 5, -3600])  # The last: the clock of the file system was set back.
def test_a_holder_on_another_machine_is_followed_once_it_gives_no_sign_of_life(
  flock, silent, tmp_path, monkeypatch, impatient, capsys
):
  monkeypatch.setattr(run_lock, "_flock", lambda file: flock)
  path = tmp_path / run_lock.NAME
  path.write_text(json.dumps(ELSEWHERE))
  os.utime(path, (time.time() - silent,) * 2)
  began = time.monotonic()
  with RunLock(tmp_path):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  said = capsys.readouterr().err
  if silent < 1:
    assert time.monotonic() - began > 0.2 and "was last in use by process 1 on node7" in said
  else:
    assert not said


@pytest.mark.parametrize("flock", [True, None])
@pytest.mark.parametrize("skew", [0, 3600])
@pytest.mark.parametrize(
  "other", [ELSEWHERE, {**ELSEWHERE, "host": None}, {**ELSEWHERE, "pid": os.getpid(), "start": "9"}, {"token": "t"}]
)
def test_a_holder_on_another_machine_that_lives_is_not_disturbed(flock, skew, other, tmp_path, monkeypatch, impatient):
  monkeypatch.setattr(run_lock, "_flock", lambda file: flock)
  path, ended = tmp_path / run_lock.NAME, threading.Event()
  path.write_text(json.dumps(other))
  os.utime(path, (time.time() + skew,) * 2)

  def beat():
    now = time.time()
    while not ended.wait(0.05):
      now += 0.05
      os.utime(path, (now + skew,) * 2)  # By a clock of its own.

  holder = threading.Thread(target=beat)
  holder.start()
  try:
    with pytest.raises(UserError, match="in use by"), RunLock(tmp_path):
      pass
  finally:
    ended.set()
    holder.join()
  assert json.loads(path.read_text()) == other


def test_a_container_with_the_same_name_is_another_machine(tmp_path, monkeypatch, impatient):
  """Its processes cannot be seen from here, so that their absence says nothing."""
  monkeypatch.setattr(run_lock, "_flock", lambda file: None)
  path = tmp_path / run_lock.NAME
  path.write_text(json.dumps({**run_lock._me(), "namespace": "pid:[1]", "pid": 2**22 + 1}))
  began = time.monotonic()
  with RunLock(tmp_path):
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize(
  ("number", "kind", "code"),
  [
    (errno.ENOSPC, SaveError, 4),
    (errno.EDQUOT, SaveError, 4),
    (errno.EROFS, UserError, 2),
    (errno.EACCES, UserError, 2),
  ],
)
def test_a_lock_that_cannot_be_written_is_one_sentence_with_the_exit_code_of_its_kind(
  number, kind, code, tmp_path, monkeypatch
):
  def fails(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(run_lock.os, "pwrite", fails)
  with pytest.raises(kind, match="cannot be written") as refused, RunLock(tmp_path / "run"):
    pass
  assert refused.value.exit_code == code and len(str(refused.value).splitlines()) == 1


HOLD = """
import sys, time, pathlib
from contrastive_jax import cli
from contrastive_jax.parallel import distributed
from contrastive_jax.run_lock import RunLock

def main():
  distributed.initialize()
  with RunLock(pathlib.Path("RUN")):
    print("held", flush=True)
    time.sleep(float("SECONDS"))

cli.run(main)
"""


@pytest.mark.slow
def test_the_processes_of_one_job_share_the_lock_and_all_of_another_are_refused(tmp_path):
  def job(seconds):
    script = tmp_path / f"hold{seconds}.py"
    script.write_text(HOLD.replace("RUN", str(tmp_path / "run")).replace("SECONDS", str(seconds)))
    return runs.start_together(functools.partial(runs.start, str(script), PYTHONPATH=str(runs.ROOT)), 2)

  first = job(600)
  try:
    assert all("held\n" in iter(process.stdout.readline, "") for process in first)  # After what Gloo says.
    for process in job(0):
      said = [line for line in runs.finish(process, expected=2).splitlines() if line and "[Gloo]" not in line]
      assert len(said) == 1 and f"in use by process {first[0].pid} on " in said[0]
    first[0].send_signal(signal.SIGKILL)
    first[0].wait()
    assert all("held" in runs.finish(process).splitlines() for process in job(0))
  finally:
    for process in first:
      process.kill()
      process.communicate()


@pytest.mark.parametrize(("changed", "held"), [({}, True), ({"start": "1"}, False), ({"pid": 2**22 + 1}, False)])
def test_without_flock_the_process_itself_is_looked_for(changed, held, tmp_path, monkeypatch, impatient):
  monkeypatch.setattr(run_lock, "_flock", lambda file: None)
  (tmp_path / run_lock.NAME).write_text(json.dumps({**run_lock._me(), **changed}))
  if held:
    with pytest.raises(UserError, match="in use"), RunLock(tmp_path):
      pass
  else:
    with RunLock(tmp_path):
      pass


def test_a_holder_that_was_followed_notices_and_leaves_the_lock_to_the_other(tmp_path, impatient):
  path = tmp_path / run_lock.NAME
  with RunLock(tmp_path) as lock:
    for _ in range(4):
      lock.confirm()
      time.sleep(0.2)
    path.write_text(json.dumps(ELSEWHERE))  # As another machine does after a silence.
    time.sleep(0.7)
    with pytest.raises(SaveError, match="was taken over by process 1 on node7 since"):
      lock.confirm()
  assert json.loads(path.read_text()) == ELSEWHERE


@pytest.mark.slow
def test_a_suspended_run_that_was_followed_writes_nothing_when_it_wakes(tmp_path):
  def files():
    return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

  many = ("--config.total_steps=1000000", "--config.checkpoint_every=1000000")
  # No rows are logged meanwhile: one that is half written when the run is suspended is completed when it wakes.
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path}", *many, "--config.log_every=100000")
  ids = tmp_path / "sample_ids.jsonl"
  while not (ids.exists() and ids.read_bytes().count(b"\n") >= 20):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.send_signal(signal.SIGSTOP)
  (tmp_path / run_lock.NAME).write_text(json.dumps(ELSEWHERE))
  time.sleep(run_lock.STALE_SECONDS / 2 + run_lock.HEARTBEAT_SECONDS)
  before = files()
  process.send_signal(signal.SIGCONT)
  said = runs.finish(process, expected=4).strip().splitlines()[-1]
  assert said.startswith(f"train.py: {tmp_path} was taken over by process 1 on node7")
  assert files() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0"])
def test_a_record_that_was_cut_does_not_stand_in_the_way(text, tmp_path):
  (tmp_path / run_lock.NAME).write_text(text)
  with RunLock(tmp_path):
    pass
