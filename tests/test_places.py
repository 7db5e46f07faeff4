"""Runs in odd places, twice at once, and killed: as a user does it."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import runs

SHORT = ("--config.total_steps=4", "--config.schedule.warmup_steps=1", "--config.checkpoint_every=2")


@pytest.mark.slow
def test_a_run_in_an_oddly_named_place_resumes_scores_and_embeds(tmp_path):
  workdir = tmp_path / "again[1] *?#%41 ünï"
  runs.train(workdir, *SHORT)
  output = runs.train(workdir, "--config.total_steps=6", *SHORT[1:])
  assert "from step 4" in output
  (tmp_path / "texts.txt").write_text("a cat\na dog\n")
  output = tmp_path / "new [folder]" / "texts.npy"
  runs.run("embed.py", f"--workdir={workdir}", f"--texts={tmp_path / 'texts.txt'}", f"--output={output}")
  assert output.exists()


@pytest.mark.slow
def test_the_second_run_at_once_is_refused_and_the_workers_of_a_killed_run_end(tmp_path):
  workdir = tmp_path / "run"
  long = ("--config.total_steps=100000", "--config.data.workers=2", "--config.checkpoint_every=100000")
  first = runs.start("train.py", runs.TINY, f"--workdir={workdir}", *long)
  try:
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
      assert first.poll() is None and time.monotonic() < deadline
      time.sleep(0.5)
    output = runs.train(workdir, *long, expected=2)
    assert f"in use by process {first.pid} " in output and len(output.strip().splitlines()) == 1
    workers = descendants(first.pid)
    assert len(workers) >= 2
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  deadline = time.monotonic() + 10
  while any(is_alive(worker) for worker in workers):
    assert time.monotonic() < deadline, "workers outlive their run"
    time.sleep(0.2)
  # Before the first checkpoint nothing is kept: a tokenizer that a start left, of whatever data, is made anew.
  stored = workdir / "tokenizer" / "tokenizer.json"
  stored.write_text("{}")
  second = runs.start("train.py", runs.TINY, f"--workdir={workdir}", *long)
  try:
    deadline = time.monotonic() + 200
    while not stored.exists() or stored.read_text() in ("{}", ""):
      assert second.poll() is None and time.monotonic() < deadline
      time.sleep(0.5)
  finally:
    second.send_signal(signal.SIGKILL)
    second.wait()


def descendants(pid: int) -> list[int]:
  """Processes below one, by their numbers."""
  children = Path(f"/proc/{pid}/task").glob("*/children")
  below = [int(child) for file in children for child in file.read_text().split()]
  return [*below, *(deeper for child in below for deeper in descendants(child))]


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that nobody has waited for does not."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


@pytest.mark.slow
def test_weights_that_are_gone_do_not_stop_a_run_that_has_checkpoints(tmp_path):
  runs.train(tmp_path / "a", *SHORT)
  start = f"--config.init_from={tmp_path / 'a'}"
  runs.train(tmp_path / "b", *SHORT, start)
  os.rename(tmp_path / "a", tmp_path / "gone")
  assert "from step 4" in runs.train(tmp_path / "b", "--config.total_steps=6", *SHORT[1:], start)
  assert "is not a run directory" in runs.train(tmp_path / "c", *SHORT, start, expected=2)
