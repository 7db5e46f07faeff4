"""A run whose machine is lost goes on from a bucket, by a real client and a server of its protocol."""

import shutil
import signal

import fsspec
import numpy as np
import pytest

from tests import runs, servers

pytestmark = [pytest.mark.slow, pytest.mark.extra]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  runs.train(workdir)
  return workdir


@pytest.fixture(scope="module")
def s3():
  with pytest.MonkeyPatch.context() as patch, servers.s3(patch) as gate:
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    yield gate


@pytest.fixture(scope="module")
def gcs():
  with pytest.MonkeyPatch.context() as patch, servers.gcs(patch):
    yield


def listed(address):
  """Names of the files below an address."""
  files = fsspec.filesystem(address.partition(":")[0], skip_instance_cache=True)
  root = address.partition("://")[2]
  return {name.removeprefix(f"{root}/"): size for name, size in sizes(files, root).items()}


def sizes(files, root):
  return {name: about["size"] for name, about in files.find(root, detail=True).items()}


def assert_same_run(workdir, other):
  runs.assert_same_bits(runs.final_state(workdir), runs.final_state(other))
  np.testing.assert_array_equal(runs.losses(workdir), runs.losses(other))
  for name in ("sample_ids.jsonl", "tokenizer/tokenizer.json"):
    assert (workdir / name).read_bytes() == (other / name).read_bytes()


def assert_mirrored(workdir, address):
  """All checkpoints of the run, its logs and its results are at the address, and nothing besides."""
  here = {path.relative_to(workdir).as_posix(): path.stat().st_size for path in workdir.rglob("*") if path.is_file()}
  steps = [path.name for path in (workdir / "checkpoints").iterdir()]
  there = listed(address)
  assert {name for name in there if name.startswith("mirror/")} == {
    "mirror/run.json",
    *(f"mirror/{k}.json" for k in steps),
  }
  assert {name: size for name, size in there.items() if not name.startswith(("mirror/", "events."))} == {
    name: size for name, size in here.items() if not name.startswith(("mirror/", "events."))
  }


def test_a_machine_that_dies_within_an_upload_costs_no_bit(undisturbed, s3, tmp_path):
  place, first, second = "s3://bucket/runs/killed", tmp_path / "first", tmp_path / "second"
  mirrored = f"--config.workdir_mirror={place}"
  puts = []

  def third_file_of_step_16(method, path):
    if method in ("PUT", "POST") and "/killed/checkpoints/16/" in path and "delete" not in path:
      puts.append(path)
    return len(puts) > 3 and puts[3] == path

  s3.holds = third_file_of_step_16
  process = runs.start("train.py", runs.TINY, f"--workdir={first}", mirrored)
  servers.wait_until(s3.reached.is_set, process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  s3.let_go()
  there = listed(place)
  assert "mirror/8.json" in there and "mirror/16.json" not in there
  assert sum(name.startswith("checkpoints/16/") for name in there) == 3
  shutil.rmtree(first)

  said = runs.train(second, mirrored)
  assert f"{second} was restored from step 8 of {place}." in said and "from step 8 to step 40" in said
  assert_same_run(second, undisturbed)
  assert_mirrored(second, place)


def test_a_run_goes_on_from_a_bucket_of_google(undisturbed, gcs, tmp_path):
  place, first, second = "gs://bucket/runs/moved", tmp_path / "first", tmp_path / "second"
  mirrored = f"--config.workdir_mirror={place}"
  process = runs.start("train.py", runs.TINY, f"--workdir={first}", mirrored)
  servers.wait_until(lambda: "mirror/16.json" in listed(place), process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  shutil.rmtree(first)
  said = runs.train(second, mirrored)
  assert f"{second} was restored from step " in said
  assert_same_run(second, undisturbed)
  assert_mirrored(second, place)


def test_another_config_and_a_damaged_checkpoint_are_refused_and_change_nothing(s3, tmp_path):
  place, first, second = "s3://bucket/runs/kept", tmp_path / "first", tmp_path / "second"
  short = ("--config.total_steps=8", f"--config.workdir_mirror={place}")
  runs.train(first, *short)
  there = listed(place)
  said = runs.train(second, *short, "--config.seed=1", expected=2)
  assert f"{place} was started with seed=0, not 1" in said and "init_from=FOLDER, a copy of it" in said
  assert not second.exists() and listed(place) == there
  damaged = next(name for name in there if name.startswith("checkpoints/8/state/d/"))
  fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"bucket/runs/kept/{damaged}", b"x" * there[damaged])
  said = runs.train(second, *short, expected=2)
  assert f"{place}/{damaged} is not what was written (its checksum differs)" in said and "Traceback" not in said


@pytest.mark.parametrize(
  ("address", "sentence"),
  [
    ("s3://nowhere/run", "workdir_mirror=s3://nowhere/run cannot be used now"),
    ("https://127.0.0.1/run", "is no place that a run can be written to"),
  ],
)
def test_a_place_that_cannot_be_used_is_one_sentence_before_anything_runs(address, sentence, s3, tmp_path):
  said = runs.train(tmp_path / "run", f"--config.workdir_mirror={address}", expected=2)
  assert sentence in said and "Traceback" not in said and "Training" not in said


def test_a_run_directory_in_a_bucket_names_the_way(tmp_path):
  said = runs.run("train.py", runs.TINY, "--workdir=gs://bucket/run", expected=2)
  assert "let --config.workdir_mirror=gs://bucket/run keep the bucket like it" in said


def test_two_processes_keep_one_mirror_and_restore_from_it_together(s3, tmp_path):
  place, first, second = "s3://bucket/runs/together", tmp_path / "first", tmp_path / "second"
  steps = ("--config.total_steps=4", "--config.checkpoint_every=2", "--config.schedule.warmup_steps=1")
  options = (f"--config.workdir_mirror={place}", *steps)
  runs.train_together(first, *options, processes=2, devices=1)
  assert_mirrored(first, place)
  state = runs.final_state(first)
  shutil.rmtree(first)
  said = runs.train_together(second, *options, processes=2, devices=1)
  assert f"{second} was restored from step 4 of {place}." in said[0] and "is complete at step 4" in said[0]
  runs.assert_same_bits(runs.final_state(second), state)
