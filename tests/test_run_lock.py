"""One run a directory: the second is refused by name, and a dead one does not stand in the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from contrastive_jax import run_lock
from contrastive_jax.errors import UserError
from contrastive_jax.run_lock import RunLock

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


@pytest.mark.parametrize("flock", [True, None])
@pytest.mark.parametrize(("silent", "held"), [(5, True), (run_lock.STALE_SECONDS + 5, False)])
def test_another_machine_is_believed_dead_without_a_heartbeat(flock, silent, held, tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, "_flock", lambda file: flock)
  path = tmp_path / run_lock.NAME
  path.write_text(json.dumps(ELSEWHERE))
  os.utime(path, (time.time() - silent,) * 2)
  if held:
    with pytest.raises(UserError, match=r"process 1 on node7 since .* or 60 seconds"), RunLock(tmp_path):
      pass
  else:
    with RunLock(tmp_path):
      assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("changed", "held"), [({}, True), ({"start": "1"}, False), ({"pid": 2**22 + 1}, False)])
def test_without_flock_the_process_itself_is_looked_for(changed, held, tmp_path, monkeypatch):
  monkeypatch.setattr(run_lock, "_flock", lambda file: None)
  (tmp_path / run_lock.NAME).write_text(json.dumps({**run_lock._me(), **changed}))
  if held:
    with pytest.raises(UserError, match="in use"), RunLock(tmp_path):
      pass
  else:
    with RunLock(tmp_path):
      pass


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\0"])
def test_a_record_that_was_cut_does_not_stand_in_the_way(text, tmp_path):
  (tmp_path / run_lock.NAME).write_text(text)
  with RunLock(tmp_path):
    pass
