"""A mirror holds what the run directory does, and nothing else ever becomes a run directory again."""

import json
import logging
import shutil
import threading

import pytest

from contrastive_jax import runs
from contrastive_jax.errors import SaveError, UserError
from contrastive_jax.stores import Store
from contrastive_jax.training import mirror, mirror_restore
from contrastive_jax.training.mirror import Mirror, store_of


def add_checkpoint(workdir, step, content="weights", row=True):
  folder = workdir / "checkpoints" / str(step)
  (folder / "state" / "d").mkdir(parents=True)
  (folder / "_CHECKPOINT_METADATA").write_text(f"{content} of step {step}")
  (folder / "state" / "d" / "0").write_bytes(f"{content} {step}".encode() * 1000)
  (folder / "state" / "empty").touch()
  if row:
    with (workdir / "metrics.jsonl").open("ab") as file:
      file.write(runs.json_line({"step": step}))


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "run"
  (folder / "tokenizer").mkdir(parents=True)
  (folder / "tokenizer" / "tokenizer.json").write_text("{}")
  runs.write_object(folder / "config.json", {"version": 0})
  (folder / "run.lock").write_text("not a part of the run")
  return folder


def keep(workdir, place, *steps, **options):
  """Makes checkpoints, with a mirror beside them."""
  options = {"keep_last": 2, "keep_every": 0} | options
  with Mirror(store_of(str(place), workdir), workdir, **options) as kept:
    kept.update()
    for step in steps:
      add_checkpoint(workdir, step)
      kept.update()


def restore(place, workdir, check=lambda folder: None):
  mirror_restore.restore(Store("workdir_mirror", str(place)), workdir, check)
  return workdir


def content(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_restored_is_what_was_kept(workdir, tmp_path):
  (workdir / "eval").mkdir()
  (workdir / "eval" / "a@2.json").write_text("[1]")
  keep(workdir, tmp_path / "place", 2, 4)
  again = content(restore(tmp_path / "place", tmp_path / "new"))
  kept = content(workdir)
  del kept["run.lock"]
  kept = {name: held for name, held in kept.items() if not name.startswith("checkpoints/2/")}
  assert again == kept and "checkpoints/4/state/empty" in again


def test_the_run_is_checked_before_anything_large_is_read_and_nothing_is_left_of_one_that_is_refused(workdir, tmp_path):
  keep(workdir, tmp_path / "place", 2)

  def refuse(folder):
    assert (folder / "checkpoints" / "2").is_dir() and not list((folder / "checkpoints" / "2").iterdir())
    assert (folder / "config.json").read_bytes() == (workdir / "config.json").read_bytes()
    raise UserError(f"{folder} was started with seed=1")

  with pytest.raises(UserError, match=f"^{tmp_path / 'place'} was started with seed=1$"):
    restore(tmp_path / "place", tmp_path / "new", refuse)
  assert not (tmp_path / "new").exists()


def test_checkpoints_leave_the_mirror_as_they_leave_the_run(workdir, tmp_path):
  place = tmp_path / "place"
  keep(workdir, place, 2, 3, 4, keep_every=2)
  for step in (2, 3):  # A run on a new machine has the newest one alone, and goes by the same rule.
    shutil.rmtree(workdir / "checkpoints" / str(step))
  (place / "checkpoints" / "1").mkdir()
  (place / "checkpoints" / "1" / "begun").write_text("by an upload that was killed")
  keep(workdir, place, 5, keep_every=2)
  assert {path.name for path in (place / "checkpoints").iterdir()} == {"2", "4", "5"}
  assert {path.name for path in (place / "mirror").iterdir()} == {"run.json", "2.json", "4.json", "5.json"}


def test_an_upload_that_was_not_finished_is_no_checkpoint_and_is_made_again(workdir, tmp_path):
  place = tmp_path / "place"
  keep(workdir, place, 2, 4)
  (place / "mirror" / "4.json").unlink()
  (place / "checkpoints" / "4" / "state" / "d" / "0").write_bytes(b"half")
  assert not (restore(place, tmp_path / "new") / "checkpoints" / "4").exists()
  assert (tmp_path / "new" / "checkpoints" / "2").is_dir()
  keep(workdir, place)
  assert (restore(place, tmp_path / "newer") / "checkpoints" / "4").is_dir()


def test_a_file_that_is_not_what_was_written_is_named_and_an_older_checkpoint_taken(workdir, tmp_path, caplog):
  place = tmp_path / "place"
  keep(workdir, place, 2, 4)
  damaged = place / "checkpoints" / "4" / "state" / "d" / "0"
  damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
  restore(place, tmp_path / "new")
  assert f"{damaged} is not what was written (its checksum differs)" in caplog.text
  assert [path.name for path in (tmp_path / "new" / "checkpoints").iterdir()] == ["2"]
  shutil.copytree(place, tmp_path / "copy")
  keep(tmp_path / "new", tmp_path / "copy", 3)  # The run goes on from step 2, and what was damaged is beyond it.
  assert {path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()} == {"2", "3"}
  (place / "checkpoints" / "2" / "state" / "empty").unlink()
  with pytest.raises(UserError, match=r"no checkpoint that can be restored.*4/state/d/0 is not what was written"):
    restore(place, tmp_path / "newer")
  assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "config.json"])
def test_a_mirror_without_what_a_run_needs_is_refused(name, workdir, tmp_path):
  keep(workdir, tmp_path / "place", 2)
  (tmp_path / "place" / name).unlink()
  with pytest.raises(UserError, match=f"lacks {name} of its run"):
    restore(tmp_path / "place", tmp_path / "new")


def test_names_that_lead_out_of_the_run_are_refused(workdir, tmp_path):
  keep(workdir, tmp_path / "place", 2)
  about = tmp_path / "place" / "mirror" / "run.json"
  found = runs.read_object(about)
  runs.write_object(about, {**found, "files": [*found["files"], "../elsewhere"]})
  with pytest.raises(UserError, match=r"names the file '\.\./elsewhere'"):
    restore(tmp_path / "place", tmp_path / "new")


def test_other_runs_are_not_written_over(workdir, tmp_path):
  place = tmp_path / "place"
  keep(workdir, place, 2)
  before = content(place)
  other = tmp_path / "other"
  shutil.copytree(workdir, other)
  shutil.rmtree(other / "mirror")
  with pytest.raises(UserError, match="mirrors another run than that of"):
    keep(other, place)
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "1.png").touch()
  with pytest.raises(UserError, match="holds files and no mirror of a run: name an empty place"):
    keep(other, tmp_path / "photos")
  assert content(place) == before


def test_what_a_start_without_a_checkpoint_left_binds_nobody(workdir, tmp_path):
  place, other = tmp_path / "place", tmp_path / "other"
  shutil.copytree(workdir, other)
  keep(workdir, place)
  (other / "tokenizer" / "more.json").write_text("{}")
  keep(other, tmp_path / "elsewhere", 2)
  keep(other, place)
  again = restore(place, tmp_path / "new")
  assert (again / "tokenizer" / "more.json").exists() and (again / "checkpoints" / "2").is_dir()


def test_a_run_that_is_behind_its_mirror_is_refused_unless_its_checkpoint_was_damaged(workdir, tmp_path):
  place = tmp_path / "place"
  keep(workdir, place, 2, 4)
  (workdir / "checkpoints" / "4").rename(tmp_path / "4")
  with pytest.raises(UserError, match=r"is at step 4 of the run and .* at 2: go on from there"):
    keep(workdir, place)
  (tmp_path / "4").rename(workdir / "checkpoints" / "4.damaged")
  keep(workdir, place)
  # The run goes on from step 2, maybe with other data: the step 4 of the mirror is not its own any more.
  assert [path.name for path in (place / "checkpoints").iterdir()] == ["2"]
  add_checkpoint(workdir, 4, "other weights")
  keep(workdir, place)
  assert b"other weights" in (restore(place, tmp_path / "new") / "checkpoints" / "4" / "state" / "d" / "0").read_bytes()


@pytest.mark.parametrize("place", ["run", "run/inside", "."])
def test_a_mirror_within_the_run_is_refused(place, workdir, tmp_path):
  with pytest.raises(UserError, match="share a folder"):
    store_of(str(tmp_path / place), workdir)


@pytest.mark.parametrize("address", ["https://host/folder", "ftp://host/folder", "s3://", "gs:///", "s3://bucket/a*"])
def test_places_that_take_no_run_are_refused(address, workdir):
  with pytest.raises(UserError, match="workdir_mirror="):
    store_of(address, workdir)


def test_a_row_that_is_being_written_is_left_to_the_next_time(workdir, tmp_path):
  with (workdir / "metrics.jsonl").open("ab") as file:
    file.write(runs.json_line({"step": 1}) + b'{"step": 2, "lo')
    file.flush()
    keep(workdir, tmp_path / "place")
  assert (tmp_path / "place" / "metrics.jsonl").read_bytes() == runs.json_line({"step": 1})


class Gated(Store):
  """A place that takes files once its gate is open."""

  def __init__(self, *arguments):
    super().__init__(*arguments)
    self.gate, self.reached = threading.Event(), threading.Event()

  def put(self, source, name):
    self.reached.set()
    assert self.gate.wait(60)
    super().put(source, name)


def test_nobody_waits_for_a_slow_place_and_a_checkpoint_that_leaves_meanwhile_still_arrives_whole(workdir, tmp_path):
  store = Gated("workdir_mirror", str(tmp_path / "place"))
  add_checkpoint(workdir, 2)
  expected = content(workdir / "checkpoints" / "2")
  with Mirror(store, workdir, keep_last=2, keep_every=0) as kept:
    kept.update()
    assert store.reached.wait(60)
    shutil.rmtree(workdir / "checkpoints" / "2")
    add_checkpoint(workdir, 4)
    kept.update()
    store.gate.set()
  assert content(tmp_path / "place" / "checkpoints" / "2") == expected
  assert content(tmp_path / "place" / "checkpoints" / "4") == content(workdir / "checkpoints" / "4")


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(mirror, "_DELAYS", (0.01,))
  monkeypatch.setattr(mirror, "_LAST_DELAYS", (0.01, 0.01))


def test_a_place_that_fails_is_tried_again(workdir, tmp_path, impatient, caplog):
  place, failed = tmp_path / "place", threading.Event()

  class Told(logging.Handler):
    def emit(self, record):
      failed.set()

  told = Told()
  mirror.log.addHandler(told)
  try:
    with Mirror(store_of(str(place), workdir), workdir, keep_last=2, keep_every=0) as kept:
      (place / "checkpoints").write_text("in the way")
      add_checkpoint(workdir, 2)
      kept.update()
      assert failed.wait(60)
      (place / "checkpoints").unlink()
  finally:
    mirror.log.removeHandler(told)
  assert "could not be brought up to date (" in caplog.text and "trying again in" in caplog.text
  assert (restore(place, tmp_path / "new") / "checkpoints" / "2").is_dir()


def test_a_mirror_that_stays_incomplete_is_told_at_the_end_and_completed_by_the_next_start(
  workdir, tmp_path, impatient
):
  place = tmp_path / "place"
  said = f"{workdir} is whole and its mirror {place} is not .*run the same command again"
  options = {"keep_last": 2, "keep_every": 0}
  with pytest.raises(SaveError, match=said), Mirror(store_of(str(place), workdir), workdir, **options) as kept:
    (place / "checkpoints").write_text("in the way")
    add_checkpoint(workdir, 2)
    kept.update()
  (place / "checkpoints").unlink()
  keep(workdir, place)
  assert (restore(place, tmp_path / "new") / "checkpoints" / "2").is_dir()
  assert not (workdir / "mirror" / "partial").exists()


def test_an_error_that_ends_the_run_is_the_one_that_is_told(workdir, tmp_path, impatient, caplog):
  place = tmp_path / "place"
  with (
    pytest.raises(UserError, match=r"^too hot$"),
    Mirror(store_of(str(place), workdir), workdir, keep_last=2, keep_every=0) as kept,
  ):
    (place / "checkpoints").write_text("in the way")
    add_checkpoint(workdir, 2)
    kept.update()
    raise UserError("too hot")
  assert "is whole and its mirror" in caplog.text


def test_two_starts_do_not_write_to_one_mirror(workdir, tmp_path):
  place, copy = tmp_path / "place", tmp_path / "copy"
  keep(workdir, place, 2)
  shutil.copytree(workdir, copy)
  taken = "was taken over by another start of the run"
  options = {"keep_last": 2, "keep_every": 0}
  with pytest.raises(SaveError, match=taken), Mirror(store_of(str(place), workdir), workdir, **options) as kept:
    keep(copy, place, 4)
    add_checkpoint(workdir, 3)
    kept.update()
  names = json.loads((place / "mirror" / "4.json").read_text())["files"]
  assert "state/d/0" in names and not (place / "checkpoints" / "3").exists()
