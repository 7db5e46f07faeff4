"""Upgrades: configs of older versions are read in today's form, with a value for every field that came later."""

import dataclasses
import json
import shutil

import pytest

from configs import common
from contrastive_jax import runs, upgrades
from contrastive_jax.errors import UserError
from contrastive_jax.schedule.stages import Stage
from tests.runs import ROOT

STORED = sorted((ROOT / "tests" / "stored").glob("*.tar.xz"))
# Names within these are values of the run, and the options of terms have the defaults of their classes.
OPEN = ("data.sources.", "objective.", "loss_options.")


def fields(tree, prefix=""):
  for name, value in tree.items():
    full = f"{prefix}{name}"
    if isinstance(value, dict) and f"{full}." not in OPEN:
      yield from fields(value, f"{full}.")
    else:
      yield full


def read(archive, folder):
  shutil.unpack_archive(archive, folder)
  return runs.read_config(folder)


@pytest.mark.parametrize("archive", STORED, ids=lambda path: path.name)
def test_a_stored_config_has_a_value_for_every_field_of_today(archive, tmp_path):
  """A field that is new needs a step in `upgrades`, which says what runs did before there was one."""
  config = read(archive, tmp_path)
  assert set(fields(config)) == set(fields(json.loads(common.get_config().to_json())))
  assert config["model"]["image"]["patch_size"] == 8  # As `stored/config.py` has it, under the old name.


def test_a_stored_stage_has_the_value_of_a_run_without_the_fields_that_came_later():
  stage = dataclasses.asdict(Stage(name="small", steps=5))
  later = ("weights", "drop_patches", "text_length", "text_rows", "text_row_length")
  older = {name: value for name, value in stage.items() if name not in later}
  content = {"total_steps": 5, "model": {}, "schedule": {}, "data": {}, "curriculum": [older]}
  assert upgrades.config(content, "a run")["curriculum"] == [stage]


def test_what_is_written_today_is_read_as_it_is(tmp_path):
  config = json.loads(common.get_config().to_json())
  runs.write_config(tmp_path, config)
  assert runs.read_config(tmp_path) == config
  assert runs.read_json(tmp_path / "config.json")["version"] == upgrades.VERSION


@pytest.mark.parametrize("version", [upgrades.VERSION + 1, "1", None])
def test_a_config_of_a_newer_version_is_refused(version, tmp_path):
  runs.write_object(tmp_path / "config.json", {"version": version, "name": "later"})
  with pytest.raises(UserError, match=r"config\.json was written by a newer version .* update"):
    runs.read_config(tmp_path)


def test_imported_weights_get_no_fields_of_training(tmp_path):
  content = {"name": "imported", "compute_dtype": "float32"}
  runs.write_object(tmp_path / "config.json", {**content, "model": {"vision": {"patch_size": 16}, "embed_dim": 8}})
  expected = {**content, "model": {"embed_dim": 8, "image": {"patch_size": 16}}}
  assert runs.read_config(tmp_path) == expected


def test_a_config_file_may_call_the_image_tower_vision():
  older = common.model("siglip_ti16", vision={"image_size": 64})
  older.vision.transformer.depth = 3
  assert older.to_dict() == common.model("siglip_ti16", image={"image_size": 64, "transformer": {"depth": 3}}).to_dict()
