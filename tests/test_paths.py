"""What a person types as a path is that path, whatever it is called, or is refused in one sentence before any work."""

import inspect
import os
from urllib.parse import unquote_to_bytes

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.training import checkpoint

NAMES = [
  "again[1]", "[!a]", "star*", "what?", "two  spaces", " leading", "pünktchen", "猫", "percent%41", "hash#1", "a;b&c",
  "quote'\"", "-dash", "colon:1", "{a,b}", "$HOME", "dots..", "new\nline", "é" * 100, "a[b]/c[d]*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_found_again_under_any_legal_name(name, tmp_path):
  workdir = paths.folder_to_write("--workdir", tmp_path / name)
  with ocp.training.Checkpointer(workdir / "checkpoints") as manager:
    manager.save_checkpointables(7, {"state": {"leaf": jnp.arange(5.0)}})
  assert checkpoint.has_checkpoint(workdir)
  with ocp.training.Checkpointer(workdir / "checkpoints") as manager:
    assert [found.step for found in manager.checkpoints] == [7]
    shape = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert manager.checkpointables_metadata(7).metadata["state"]["leaf"].shape == (5,)
    loaded = manager.load_checkpointables(7, {"state": {"leaf": shape}})["state"]["leaf"]
  np.testing.assert_array_equal(loaded, np.arange(5.0))


def test_a_home_folder_is_expanded_and_a_relative_path_stays_relative(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert paths.folder_to_write("--workdir", "~/run") == tmp_path / "run"
  assert str(paths.folder_to_write("--workdir", "runs/a/")) == "runs/a"
  assert str(paths.folder_to_write("--workdir", "no/../run")) == "run"
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "x" * 300, "~no-such-user-here/run", "loop/run", "loop"])
def test_what_is_no_path_is_refused_by_every_reading(text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.symlink("loop", "loop")
  for read in (paths.typed, paths.folder_to_write, paths.file_to_write, paths.run_to_write, paths.run_to_read):
    with pytest.raises(UserError, match=r"^--flag=") as refused:
      read("--flag", text)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("path", [None, 3, True, b"runs/a", ["runs/a"]])
def test_what_is_neither_text_nor_a_path_is_refused(path):
  unchecked = inspect.unwrap(paths.typed)  # Outside of tests nothing compares arguments with their types.
  with pytest.raises(UserError, match=rf"^--flag=.* is a {type(path).__name__} and no path"):
    unchecked("--flag", path)


def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("")
  (tmp_path / "folder").mkdir()
  os.symlink("nowhere", "dangling")
  for bad in ("file", "file/below", "file/below/that", "dangling", "dangling/run", "/proc/run/there"):
    with pytest.raises(UserError):
      paths.folder_to_write("--workdir", bad)
  for bad in ("folder", "folder/", "new/", "file/below", "dangling", "dangling/a.json"):
    with pytest.raises(UserError):
      paths.file_to_write("--output", bad)
  assert sorted(os.listdir()) == ["dangling", "file", "folder"] and not os.listdir("folder")
  assert str(paths.run_to_write("--workdir", "folder")) == "folder"
  os.symlink("/proc", "folder/checkpoints")  # A folder that takes no file from anybody.
  with pytest.raises(UserError, match=r"^--workdir=folder/checkpoints cannot be written"):
    paths.run_to_write("--workdir", "folder")


@pytest.mark.parametrize("address", ["gs://bucket/run", "S3://bucket/run"])
def test_a_run_directory_in_a_bucket_names_what_keeps_a_run_there(address):
  with pytest.raises(UserError, match=rf"^--workdir={address} .*--config\.workdir_mirror={address} "):
    paths.run_to_write("--workdir", address)


@pytest.mark.parametrize("name", [r"back\slash", r"a\b/run", os.fsdecode(b"caf\xe9"), "gs:", "my-gs:/run"])
def test_what_tensorstore_takes_for_another_path_is_refused(name, tmp_path):
  (tmp_path / name).mkdir(parents=True)
  (tmp_path / name / "config.json").write_text("{}")
  for read in (paths.folder_to_write, paths.run_to_read):
    with pytest.raises(UserError, match=r"checkpoints|bucket"):
      read("--workdir", tmp_path / name)


def test_linked_folders_are_followed_once(tmp_path):
  outside, inside = tmp_path / "outside", tmp_path / "inside"
  (outside / "deep").mkdir(parents=True)
  (inside / "real").mkdir(parents=True)
  for path in (outside / "a.png", outside / "deep/b.png", inside / "real/c.png"):
    path.write_bytes(b"")
  (inside / "linked").symlink_to(outside)
  (inside / "again").symlink_to(inside / "real")
  (outside / "deep/round").symlink_to(inside)
  (inside / "itself").symlink_to(inside / "itself")
  (inside / "nowhere").symlink_to(tmp_path / "gone")
  found = sorted(path.relative_to(inside).as_posix() for path in paths.files_below(inside))
  assert found == ["itself", "linked/a.png", "linked/deep/b.png", "nowhere", "real/c.png"]


@pytest.mark.parametrize(
  "raw", [b"\xff.png", b"a\nb.png", b"a\r", b"%FF.png", b"caf\xe9%41.png", b"plain 100%.png", "猫".encode()]
)
def test_any_file_name_is_an_id_in_utf8_and_can_be_had_back(raw):
  said = paths.as_id(os.fsdecode(raw))
  said.encode()
  assert said.isprintable() and unquote_to_bytes(said) == raw
