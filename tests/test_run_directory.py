"""A run directory that goes away or cannot be written, and telemetry that fails: one sentence, or none at all."""

import functools
import os
import shutil
import signal
import subprocess
import time

import pytest

from benchmarks.disk_full import fill
from tests import runs

pytestmark = pytest.mark.slow

MANY = ("--config.total_steps=1000000", "--config.checkpoint_every=200")


def wait_for_steps(workdir, process, steps) -> None:
  """Waits until so many steps are logged."""
  ids, deadline = workdir / "sample_ids.jsonl", time.monotonic() + 240
  while not (ids.exists() and ids.read_bytes().count(b"\n") >= steps):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)


def the_sentence(output: str) -> str:
  """The last line of what a command printed, which must be its only complaint."""
  assert "Traceback" not in output, output
  return output.strip().splitlines()[-1]


@pytest.fixture
def disk(tmp_path):
  """A small disk of its own."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(tmp_path)]
  if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("mounting a small disk is not permitted here")
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("way", ["removed", "renamed"])
def test_a_run_directory_that_goes_away_is_one_sentence(way, tmp_path):
  workdir = tmp_path / "run"
  process = runs.start("train.py", runs.TINY, f"--workdir={workdir}", *MANY)
  wait_for_steps(workdir, process, 20)
  if way == "renamed":
    workdir.rename(tmp_path / "elsewhere")
  while workdir.exists():  # What the run writes meanwhile keeps a folder from being removed at the first try.
    shutil.rmtree(workdir, ignore_errors=True)
  try:
    said = the_sentence(runs.finish(process, expected=4))
  finally:
    process.kill()
  assert str(workdir) in said and ("is gone" in said or "was removed" in said)
  assert not workdir.exists()


def test_a_disk_that_is_read_only_is_one_sentence_and_the_run_goes_on_later(disk):
  runs.train(disk / "run", "--config.total_steps=8")
  more = "--config.total_steps=16"
  subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
  assert "takes no file (Read-only file system)" in the_sentence(runs.train(disk / "run", more, expected=2))
  subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
  assert "from step 8" in runs.train(disk / "run", more)


def test_a_save_of_two_processes_that_fails_ends_both_and_the_run_goes_on(disk):
  workdir = disk / "run"
  options = (f"--workdir={workdir}", *MANY, "--config.checkpoint_every=40")
  one = functools.partial(runs.start, "train.py", runs.TINY, *options)
  job = runs.start_together(one, 2)
  try:
    wait_for_steps(workdir, job[0], 50)
    filler = fill(disk)
    for process in job:
      said = the_sentence(runs.finish(process, expected=4))
      assert "checkpoint " in said and "last good checkpoint" in said
  finally:
    for process in job:
      process.kill()
      process.communicate()
  filler.unlink()
  last = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
  (workdir / "sample_ids.jsonl").unlink()  # It would hold the steps after the last checkpoint until the start is done.
  job = runs.start_together(one, 2)
  wait_for_steps(workdir, job[0], 20)
  job[0].send_signal(signal.SIGTERM)
  said, _ = (runs.finish(process, expected=143) for process in job)
  assert f"from step {last}" in said


WANDB = {
  "init": "def init(**_): raise RuntimeError('no network\\nnor login')",
  "log": "class R:\n  def log(self, *_, **__): raise OSError('away')\n  finish = log\ndef init(**_): return R()",
}


@pytest.mark.parametrize("fails", WANDB)
def test_weights_and_biases_and_a_profiler_that_fail_harm_no_run(fails, tmp_path):
  (tmp_path / "wandb.py").write_text(WANDB[fails])
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "profile").write_text("A file where the profiler wants a folder.")
  steps = ("--config.total_steps=4", "--config.schedule.warmup_steps=1", "--config.profile_steps=(2, 3)")
  output = runs.train(workdir, *steps, "--config.wandb_project=x", PYTHONPATH=str(tmp_path))
  assert "Traceback" not in output and output.count("Weights & Biases") in (1, 2)
  assert "profile could not be written" in output
  assert len(runs.losses(workdir)) == 4 and (workdir / "report.html").exists()
