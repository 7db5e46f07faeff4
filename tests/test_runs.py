"""Files of a run directory: written whole, read in one sentence when damaged, and never a reason to end a run."""

import json
import logging
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import losses, runs
from contrastive_jax.errors import NonFiniteError, SaveError, UserError
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.training import config as run_config
from contrastive_jax.training import fields
from contrastive_jax.training.checkpoint import Checkpoints, restore_params
from contrastive_jax.training.metrics import Board, Writer
from contrastive_jax.training.state import TrainState
from tests import tiny


def state(step=1, value=0.5):
  params = {"image": {"kernel": jnp.full((4, 3), value)}, "log_logit_scale": jnp.float32(2)}
  opt_state = (optax.ScaleByAdamState(jnp.int32(step), {"k": jnp.ones((4, 3))}, {}), {})
  return TrainState(step=jnp.int32(step), params=params, opt_state=opt_state, average=None)


@pytest.fixture
def run(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    for step in (1, 2):
      checkpoints.save(state(step, step / 2), {"tokenizer": "abc"})
    checkpoints.wait()
  return tmp_path


def edit_metadata(run, step, change):
  path = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  content = json.loads(path.read_text())
  change(content["custom_metadata"])
  path.write_text(json.dumps(content))


DAMAGE = {
  "no checksums": (lambda metadata: metadata.pop("checksum"), "holds no checksums"),
  "no metadata": (lambda metadata: metadata.clear(), "holds no checksums"),
  "another tokenizer": (lambda metadata: metadata.update(tokenizer="abd"), "is not what was written"),
  "another checksum": (
    lambda metadata: metadata["checksum"].update({"['params']['image']['kernel']": 1}),
    "not what was",
  ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_metadata_is_told_and_the_checkpoint_before_is_read(run, kind, caplog):
  change, sentence = DAMAGE[kind]
  edit_metadata(run, 2, change)
  with pytest.raises(UserError, match=sentence):
    restore_params(run, 2)  # A step that was asked for has no substitute.
  restored = restore_params(run, None)
  assert restored.step == 1 and "Checkpoint 2" in caplog.text
  np.testing.assert_array_equal(restored.params["image"]["kernel"], np.full((4, 3), 0.5))
  with Checkpoints(run / "checkpoints") as checkpoints:
    assert int(checkpoints.restore(state())[0].step) == 1


def test_old_checkpoints_without_a_digest_still_open(run):
  edit_metadata(run, 2, lambda metadata: metadata.pop("digest"))
  assert restore_params(run, None).step == 2


def test_a_wrong_leaf_is_named(run):
  def swap(metadata):
    del metadata["digest"]
    metadata["checksum"]["['params']['log_logit_scale']"] += 1

  edit_metadata(run, 2, swap)
  with pytest.raises(UserError, match=r"checkpoint 2 of .* damaged: the checksum of params/log_logit_scale differs"):
    restore_params(run, 2)


RENAMED = ("init_timestamp_nsecs", "commit_timestamp_nsecs", "item_handlers", "metrics", "custom_metadata", "state")


@pytest.mark.parametrize("what", [*RENAMED, "list", "float", "far", "null"])
@pytest.mark.parametrize("step", [1, 2])
def test_damaged_metadata_of_any_checkpoint_never_hide_the_others(run, what, step):
  path = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  text, stamp = path.read_text(), '"commit_timestamp_nsecs": '
  changed = {
    "list": "[1]",
    "null": "null",
    "float": text.replace(stamp, stamp + "1."),
    "far": text.replace(stamp, stamp + "9" * 9),
  }
  path.write_text(changed.get(what) or text.replace(f'"{what}"', f'"{what[:-1]}z"', 1))
  try:
    found = restore_params(run, None).step
    assert found in (1, 2) and restore_params(run, found).step == found
  except UserError as error:
    assert "\n" not in str(error)
  assert restore_params(run, 3 - step).step == 3 - step
  with Checkpoints(run / "checkpoints") as checkpoints:
    assert int(checkpoints.restore(state())[0].step) in (1, 2)


def test_every_file_of_a_checkpoint_may_be_cut_or_missing(run):
  files = [path for path in (run / "checkpoints" / "2").rglob("*") if path.is_file()]
  assert len(files) > 3
  for path in files:
    content = path.read_bytes()
    for damaged in (None, b"", content[: len(content) // 2]):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      try:
        restored = restore_params(run, None)
        expected = 0.5 * restored.step
        np.testing.assert_array_equal(restored.params["image"]["kernel"], np.full((4, 3), expected))
      except UserError as error:
        assert "\n" not in str(error)
      path.write_bytes(content)


def test_what_is_saved_is_finite(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(state(1), {})
    with pytest.raises(NonFiniteError, match=r"step 2: params/image/kernel .*last good checkpoint: 1$"):
      checkpoints.save(state(2, np.inf), {})
    assert checkpoints.steps == [1]


def test_a_run_directory_that_vanished_is_one_sentence(tmp_path):
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    checkpoints.save(state(1), {})
    checkpoints.wait()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="run is gone"):
      checkpoints.save(state(2), {})


def test_config_is_protected_by_its_digest(tmp_path):
  path = runs.write_config(tmp_path, {"name": "tiny", "rate": 0.25, "sizes": (1, 2)})
  assert runs.read_config(tmp_path) == {"name": "tiny", "rate": 0.25, "sizes": [1, 2]}
  text = path.read_text()
  for place in range(len(text)):
    for bit in (0, 3, 6):
      damaged = bytearray(text.encode())
      damaged[place] ^= 1 << bit
      path.write_bytes(damaged)
      try:
        read = runs.read_config(tmp_path)
      except UserError as error:
        assert str(path) in str(error)
      else:  # The name of the digest itself, or white space.
        assert {"name": "tiny", "rate": 0.25, "sizes": [1, 2]}.items() <= read.items()
  path.write_text('{"name": "old"}')
  assert runs.read_config(tmp_path) == {"name": "old"}


def test_a_folder_within_a_run_is_told_the_run(tmp_path):
  runs.write_config(tmp_path, {"name": "tiny"})
  checkpoint = tmp_path / "checkpoints" / "8"
  checkpoint.mkdir(parents=True)
  with pytest.raises(UserError, match=f"but {tmp_path} has one"):
    runs.read_config(checkpoint)
  with pytest.raises(UserError, match=r"it has no config\.json$"):
    runs.read_config(tmp_path / "a" / "b" / "c")


DESCRIPTIONS = [
  b"",
  b"{",
  b"[1]",
  b"\xff",
  b"null",
  b'{"kind": "file"}',
  b'{"kind": "fild", "file": "x", "options": {}}',
]


@pytest.mark.parametrize("content", DESCRIPTIONS)
def test_a_damaged_description_of_a_tokenizer_is_one_sentence(tmp_path, content):
  (tmp_path / tokenizers._KIND_FILE).write_bytes(content)
  with pytest.raises(UserError, match="is damaged"):
    tokenizers.load(tmp_path)


def test_a_run_without_its_tokenizer_is_told_so(tmp_path):
  folder = tmp_path / "file:x" / "tokenizer"  # A name like the spec of a tokenizer's file.
  with pytest.raises(UserError, match=f"{folder} is missing, the tokenizer of the run"):
    tokenizers.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_damaged_config_is_one_sentence(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match="is damaged"):
    runs.read_config(tmp_path)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda config: config.update(data=3), "data=3 must be a part"),
    (lambda config: config.update(model="siglip_b16"), "model='siglip_b16' must be a part"),
    (lambda config: config.update(loss_options=None), "loss_options=None must be a part"),
    (lambda config: config.update(total_steps="8"), "total_steps='8' must be a whole number"),
    (lambda config: config.update(compute_dtype=None), "compute_dtype=None must be text"),
    (lambda config: config["model"]["image"]["transformer"].update(depth="4"), r"depth='4' must be a whole number"),
    (lambda config: config.update(curriculum=[{"step": 3}]), r"no field 'curriculum\.0\.step'"),
  ],
)
def test_a_config_that_a_person_edited_is_read_or_one_sentence(change, said, tmp_path):
  """Without its digest, as the error about one that differs says."""
  config = run_config.as_json(tiny.get_config())
  runs.write_atomically(tmp_path / "config.json", json.dumps(config | {"log_every": 7, "of_another_version": 1}))
  assert fields.checked_config(tmp_path)["log_every"] == 7
  change(config)
  runs.write_atomically(tmp_path / "config.json", json.dumps(config))
  with pytest.raises(UserError, match=rf"config\.json .*{said}.*put back the original"):
    fields.checked_config(tmp_path)


@pytest.mark.parametrize(
  "broken", [b'{"step": 2, "lo\n', b"\xff\xfe\n", b"\n", b"[3]\n", b'{"step": "x"}\n', b'{"a": 1}\n']
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_broken_lines_are_left_out(tmp_path, caplog, broken, place):
  lines = [b'{"step": %d}\n' % step for step in (1, 2, 3)]
  lines.insert(place, broken)
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"".join(lines))
  assert [row["step"] for row in runs.read_json_lines(path)] == [1, 2, 3]
  assert f"line {place + 1}" in caplog.text
  rows = runs.JsonLines(path, restored_step=2)
  rows.write({"step": 3, "new": True})
  assert runs.read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]


def test_a_line_that_a_kill_left_unfinished_is_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}')
  runs.JsonLines(path, restored_step=5).write({"step": 2})
  assert path.read_bytes() == runs.json_line({"step": 1}) + runs.json_line({"step": 2})


ROWS = [{"step": 1, "loss": 2.125, "stage": "low"}, {"step": 2, "loss": 1.5}, {"step": 3, "ids": [7, 8, 9]}]


def test_no_bit_of_a_row_changes_unnoticed(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  content = b"".join(map(runs.json_line, ROWS))
  for place in range(len(content)):
    for bit in range(8):
      damaged = bytearray(content)
      damaged[place] ^= 1 << bit
      path.write_bytes(damaged)
      caplog.clear()
      found = runs.read_json_lines(path)
      assert len(found) in (1, 2) and all(row in ROWS for row in found) and caplog.text.count("damaged") == 1


def test_rows_are_plain_json_and_those_of_older_versions_are_read(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  old = [*ROWS[:1], {"step": 2, "stage": "0f1e2d3c"}, {"step": 3, "crc": "no checksum of ours"}]
  path.write_text("".join(json.dumps(row) + "\n" for row in old))
  assert [row["step"] for row in runs.read_json_lines(path)] == [1, 2, 3] and not caplog.text
  runs.JsonLines(path, restored_step=2).write({"step": 3, "loss": 1.0})  # From now on all rows carry one.
  read = [json.loads(line) for line in path.read_text().splitlines()]
  assert all(len(row.pop("crc")) == 8 for row in read) and read == [*old[:2], {"step": 3, "loss": 1.0}]


def test_an_object_whose_digest_has_another_name_is_damaged(tmp_path):
  path = runs.write_object(tmp_path / "a.json", {"step": 1})
  path.write_text(path.read_text().replace('"digest"', '"dhgest"'))
  with pytest.raises(UserError, match="name of its digest"):
    runs.read_object(path)


def test_a_folder_whose_writer_died_is_not_there(tmp_path):
  def dies(folder):
    folder.mkdir()
    (folder / "half").write_text("x")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    runs.write_folder(tmp_path / "tokenizer", dies)
  assert not list(tmp_path.iterdir())


def test_rows_wait_for_a_directory_that_is_away(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  home, away = tmp_path / "run", tmp_path / "away"
  home.mkdir()
  writer = Writer(home, restored_step=0)
  writer.write({"step": 1, "loss": 1.0})
  home.rename(away)
  for step in (2, 3):
    writer.write({"step": step, "loss": 1.0})
  away.rename(home)
  writer.write({"step": 4, "loss": 1.0})
  writer.close()
  assert [row["step"] for row in runs.read_json_lines(home / "metrics.jsonl")] == [1, 2, 3, 4]
  assert caplog.text.count("metrics.jsonl cannot be written") == 1


@pytest.mark.parametrize("patched", [True, False])
def test_an_answer_of_tensorstore_to_an_event_loop_that_is_closed_is_not_shown_and_other_errors_are(patched):
  """Without the patch its traceback is shown: else the patch is needed no longer."""
  program = f"""
import asyncio, tensorstore
if {patched}:
  from contrastive_jax.training import orbax_patches
  orbax_patches.apply()
promise, future = tensorstore.Promise.new()

async def wait():
  await future

loop = asyncio.new_event_loop()
task = loop.create_task(wait())
task._log_destroy_pending = False
loop.run_until_complete(asyncio.sleep(0))
loop.close()
promise.set_result(1)

class Broken:
  def __del__(self):
    raise RuntimeError("something else")

Broken()
"""
  said = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True).stderr
  assert ("Event loop is closed" in said) is not patched
  assert "something else" in said


def test_a_full_disk_drops_rows_of_tensorboard_and_goes_on(tmp_path, monkeypatch):
  from tensorboardX.event_file_writer import EventsWriter

  board, write = Board(tmp_path, purge_step=None), EventsWriter.flush

  def full(self):
    raise OSError(28, "No space left on device")

  board.write({"loss": 1.0}, 1)
  monkeypatch.setattr(EventsWriter, "flush", full)
  board.write({"loss": 1.0}, 2)
  monkeypatch.setattr(EventsWriter, "flush", write)
  board.write({"loss": 1.0}, 3)
  board.close()
  assert board.dropped == 1 and len(list(tmp_path.glob("events.*"))) == 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tile", [None, 16])
def test_a_tie_is_no_hit(seed, tile):
  rng = np.random.default_rng(seed)
  one = rng.normal(size=(1, int(rng.integers(3, 300))))
  same = jnp.asarray(np.repeat(one / np.linalg.norm(one), 64, axis=0), jnp.float32)
  _, metrics = losses.OBJECTIVES["softmax"](same, same, logit_scale=float(rng.uniform(1, 100)), tile=tile)
  assert metrics["accuracy_image_to_text"] == metrics["accuracy_text_to_image"] == 0
