"""Killed, damaged and moved runs end where an uninterrupted one does."""

import fcntl
import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from contrastive_jax import upgrades
from contrastive_jax.runs import read_config
from tests import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  runs.train(workdir)
  return workdir


def kill_when(process, condition) -> None:
  deadline = time.monotonic() + 240
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.communicate()


def test_three_kills_change_no_bit(uninterrupted, tmp_path):
  draw = random.Random(0)
  ids = tmp_path / "sample_ids.jsonl"
  checkpoints = tmp_path / "checkpoints"

  def reached(step):
    return lambda: ids.exists() and len(ids.read_text().splitlines()) >= step

  def saving():
    return any(checkpoints.glob("*.orbax-checkpoint-tmp*"))

  for condition in (reached(draw.randint(9, 12)), saving, reached(draw.randint(25, 36))):
    kill_when(runs.start("train.py", runs.TINY, f"--workdir={tmp_path}"), condition)
  runs.train(tmp_path)

  runs.assert_same_bits(runs.final_state(tmp_path), runs.final_state(uninterrupted))
  assert ids.read_text() == (uninterrupted / "sample_ids.jsonl").read_text()
  np.testing.assert_array_equal(runs.losses(tmp_path), runs.losses(uninterrupted))


def test_a_signal_saves_and_the_run_goes_on_from_there(uninterrupted, tmp_path):
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path}", "--config.checkpoint_every=1000")
  ids = tmp_path / "sample_ids.jsonl"
  while not (ids.exists() and len(ids.read_text().splitlines()) >= 5):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert "Stopped at step" in runs.finish(process, expected=128 + signal.SIGTERM)
  output = runs.train(tmp_path)
  assert "from step" in output
  runs.assert_same_bits(runs.final_state(tmp_path), runs.final_state(uninterrupted))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_to_all_processes_of_a_run_lets_its_data_workers_finish_the_step(name, code, uninterrupted, tmp_path):
  options = ("--config.checkpoint_every=1000", "--config.total_steps=100000", "--config.data.workers=2")
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path}", *options, start_new_session=True)
  ids = tmp_path / "sample_ids.jsonl"
  while not (ids.exists() and len(ids.read_text().splitlines()) >= 5):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  os.killpg(process.pid, getattr(signal, name))
  said = runs.finish(process, expected=code)
  assert "Stopped at step" in said and "Traceback" not in said
  (saved,) = (tmp_path / "checkpoints").iterdir()
  read = ids.read_text().splitlines()
  assert (
    len(read) == int(saved.name)
    and read[:40] == (uninterrupted / "sample_ids.jsonl").read_text().splitlines()[: len(read)]
  )


def test_a_run_whose_terminal_is_closed_saves_its_steps(tmp_path):
  controller, side = pty.openpty()
  command = [sys.executable, "train.py", runs.TINY, f"--workdir={tmp_path}", "--config.total_steps=100000"]
  process = subprocess.Popen(
    [*command, "--config.checkpoint_every=100000"],
    cwd=runs.ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    stdin=side,
    stdout=side,
    stderr=side,
    start_new_session=True,
    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
  )
  os.close(side)
  ids = tmp_path / "sample_ids.jsonl"
  while not (ids.exists() and len(ids.read_text().splitlines()) >= 5):
    assert process.poll() is None
    if select.select([controller], [], [], 0.05)[0]:
      os.read(controller, 1 << 16)  # A terminal that nobody reads makes who writes to it wait.
  os.close(controller)
  assert process.wait(timeout=240) == 129
  (saved,) = (tmp_path / "checkpoints").iterdir()
  assert len(ids.read_text().splitlines()) == int(saved.name)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(uninterrupted, tmp_path):
  runs.train(tmp_path)
  for data in (tmp_path / "checkpoints" / "40" / "state").rglob("d/*"):
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
  output = runs.train(tmp_path)
  assert "Checkpoint 40 is damaged" in output and "from step 32" in output
  assert (tmp_path / "checkpoints" / "40.damaged").is_dir()
  runs.assert_same_bits(runs.final_state(tmp_path), runs.final_state(uninterrupted))


def test_another_mesh_continues_with_the_same_samples(uninterrupted, tmp_path):
  runs.train(tmp_path, "--config.total_steps=40", "--config.profile_steps=(2, 3)", "--config.checkpoint_every=20")
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  whole = runs.final_state(uninterrupted)
  runs.assert_same_bits(runs.final_state(tmp_path), whole)

  moved = tmp_path / "moved"
  process = runs.start("train.py", runs.TINY, f"--workdir={moved}")
  kill_when(process, lambda: (moved / "checkpoints" / "16").exists())
  runs.train(moved, "--config.mesh.fsdp=4", devices=8)
  runs.assert_close(runs.final_state(moved), whole, 1e-5)
  assert (moved / "sample_ids.jsonl").read_text() == (uninterrupted / "sample_ids.jsonl").read_text()


def test_two_processes_continue_what_one_began(uninterrupted, tmp_path):
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path}")
  kill_when(process, lambda: (tmp_path / "checkpoints" / "16").exists())
  runs.train_together(tmp_path, processes=2, devices=2)
  runs.assert_close(runs.final_state(tmp_path), runs.final_state(uninterrupted), 1e-5)
  ours, theirs = (runs.rows(path / "sample_ids.jsonl") for path in (tmp_path, uninterrupted))
  assert ours == theirs
  assert [row["step"] for row in ours] == list(range(1, 41))


def test_a_resume_that_made_no_checkpoint_changed_nothing(tmp_path):
  """It wanted more steps and other data, and was killed before its first step."""
  runs.train(tmp_path, "--config.total_steps=8")
  before = (tmp_path / "config.json").read_text()
  other = "--config.data.sources.twemoji=3.0"
  later = ("--config.total_steps=4000", "--config.checkpoint_every=4000")
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path}", *later, other)
  assert any("Training from step 8" in line for line in iter(process.stdout.readline, ""))
  process.kill()
  process.communicate()
  assert (tmp_path / "config.json").read_text() == before
  runs.train(tmp_path, "--config.total_steps=16", other)
  metadata = json.loads((tmp_path / "checkpoints" / "16" / "_CHECKPOINT_METADATA").read_text())
  segments = metadata["custom_metadata"]["segments"]
  assert [segment["steps"] for segment in segments] == [8, 8] and dict(segments[1]["sources"])["twemoji"] == 3.0
  config = read_config(tmp_path)
  assert config["total_steps"] == 16 and upgrades.stamped(config) == metadata["custom_metadata"]["config"]


def test_changed_data_is_a_new_segment(tmp_path):
  runs.train(tmp_path, "--config.total_steps=8")
  runs.train(tmp_path, "--config.total_steps=16", "--config.data.sources.twemoji=3.0")
  metadata = json.loads((tmp_path / "checkpoints" / "16" / "_CHECKPOINT_METADATA").read_text())
  segments = metadata["custom_metadata"]["segments"]
  assert [segment["steps"] for segment in segments] == [8, 8]
  assert dict(segments[0]["sources"])["twemoji"] == 0.425 and dict(segments[1]["sources"])["twemoji"] == 3.0


@pytest.mark.parametrize(
  ("terms", "options", "tolerance"),
  [
    # Derivatives by a temperature of 0.01 magnify the rounding of similarities a hundred times.
    (["individual_temperatures"], (), 1e-3),
    (
      ["sogclr", "queued_softmax", "swapped_prototypes"],
      (
        "--config.loss_options.sogclr.gamma_steps=12",
        "--config.loss_options.queued_softmax.size=96",
        "--config.loss_options.swapped_prototypes.prototypes=8",
        "--config.loss_options.swapped_prototypes.queue=96",
        "--config.loss_options.swapped_prototypes.frozen_steps=6",
      ),
      1e-5,
    ),
  ],
)
def test_what_a_term_remembers_is_resumed(terms, options, tolerance, tmp_path):
  """Killed on two devices: bit for bit on two, to rounding on eight, and other sources are refused."""
  objective = f"--config.objective={dict.fromkeys(terms, 1.0)}"
  options = (objective, "--config.total_steps=20", "--config.checkpoint_every=4", *options)
  whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
  runs.train(whole, *options, devices=2)
  process = runs.start("train.py", runs.TINY, f"--workdir={killed}", *options, devices=2)
  kill_when(process, lambda: (killed / "checkpoints" / "8").exists())
  shutil.copytree(killed, moved)
  runs.train(killed, *options, devices=2)
  state = runs.final_state(whole)
  for term in terms:
    remembered = [leaf for name, leaf in state.items() if name.startswith(f"['objective']['{term}']")]
    assert remembered and all(np.any(leaf) for leaf in remembered), term
  runs.assert_same_bits(runs.final_state(killed), state)
  runs.train(moved, *options, "--config.mesh.fsdp=2", devices=8)
  runs.assert_close(runs.final_state(moved), state, tolerance)
  if len(terms) > 1:
    return  # What follows costs a start, and is the same for all of them.
  other = (*options, "--config.data.sources={'noto': 1.0}", "--config.total_steps=30")
  assert "the sources of the run cannot change" in runs.train(whole, *other, devices=2, expected=2)


@pytest.mark.extra
def test_all_that_terms_remember_at_once_is_resumed(tmp_path):
  """A queue of what the average makes, targets that come by and by, what stands within other terms, averages of heads.

  Killed on two devices: bit for bit on two, and to rounding from two to eight and back to two.
  """
  terms = ("sigmoid", "queued_softmax", "matryoshka", "multi_head", "individual_temperatures", "pixpro")
  given = {
    "sigmoid": {"balance_bias": True},
    "queued_softmax": {"size": 96, "average": True, "soft_share": 0.5, "soft_steps": 18},
    "matryoshka": {"of": "sogclr", "dims": (8,)},
    "sogclr": {"gamma_steps": 18},
    "multi_head": {"of": "swapped_prototypes", "heads": 2, "hidden": 16, "dim": 8},
    "swapped_prototypes": {"prototypes": 8, "queue": 96, "frozen_steps": 6},
    # At 0.01, as by default, derivatives by a temperature magnify the rounding of similarities a hundred times.
    "individual_temperatures": {"temperature": 0.2, "gamma_steps": 18},
  }
  options = (
    f"--config.objective={dict.fromkeys(terms, 1.0)}",
    "--config.total_steps=28",
    "--config.checkpoint_every=4",
    *(f"--config.loss_options.{term}.{name}={value}" for term, own in given.items() for name, value in own.items()),
  )
  whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
  assert "The logit bias begins at" in runs.train(whole, *options, devices=2)
  process = runs.start("train.py", runs.TINY, f"--workdir={killed}", *options, devices=2)
  kill_when(process, lambda: (killed / "checkpoints" / "8").exists())
  shutil.copytree(killed, moved)
  assert "The logit bias begins at" not in runs.train(killed, *options, devices=2)
  state = runs.final_state(whole)
  for term in ("queued_softmax", "matryoshka", "multi_head", "individual_temperatures"):
    remembered = [leaf for name, leaf in state.items() if name.startswith(f"['objective']['{term}']")]
    assert remembered and all(np.any(leaf) for leaf in remembered), term
  assert any(name.startswith("['average']['objective']['pixpro']") for name in state)
  runs.assert_same_bits(runs.final_state(killed), state)

  process = runs.start("train.py", runs.TINY, f"--workdir={moved}", *options, "--config.mesh.fsdp=2", devices=8)
  kill_when(process, lambda: (moved / "checkpoints" / "16").exists())
  said = runs.train(moved, *options, devices=2)
  assert any(f"from step {step}" in said for step in (16, 20, 24))
  runs.assert_close(runs.final_state(moved), state, 1e-5)
