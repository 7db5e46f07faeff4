"""A run through all kinds of stages, killed in between, ends where an undisturbed one does."""

import json

import numpy as np
import pytest

from tests import runs
from tests.test_resume import kill_when

pytestmark = pytest.mark.slow
STAGES = "--config=tests/tiny_stages.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("teacher")
  runs.train(workdir, "--config.total_steps=8")
  return workdir


def train(workdir, teacher, **options):
  return runs.run("train.py", STAGES, f"--workdir={workdir}", f"--config.distillation.teacher={teacher}", **options)


@pytest.fixture(scope="module")
def undisturbed(teacher, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  output = train(workdir, teacher)
  # One program for each shape: fixed, native and clips; the native images of the last stage come without a teacher.
  assert output.count("Compiled the step") == 4
  return workdir


def test_every_stage_leaves_its_mark(undisturbed):
  rows = [row for row in runs.rows(undisturbed / "metrics.jsonl") if "loss" in row]
  assert [row["stage"] for row in rows] == ["fixed"] * 5 + ["native"] * 5 + ["video"] * 6
  assert all(("loss_distill_features" in row) == (row["stage"] != "video") for row in rows)
  assert all(("image_token_fill" in row) == (row["stage"] == "native") for row in rows[:10])
  weights = [row["factor_distill_features"] for row in rows[:10]]
  np.testing.assert_allclose(weights, [1] * 5 + [1, 0.8, 0.6, 0.4, 0.2], atol=1e-6)


def test_nothing_of_the_teacher_is_in_the_checkpoint(undisturbed, teacher):
  state, config = runs.final_state(undisturbed), json.loads((undisturbed / "config.json").read_text())
  assert config["distillation"]["teacher"] == str(teacher)
  names = {name.split("']")[0] for name in state if name.startswith(".params") or "params" in name}
  assert not any("teacher" in name for name in state), names


@pytest.mark.parametrize("step", [6, 13], ids=["in the second stage", "between turns"])
def test_a_kill_changes_no_bit(undisturbed, teacher, tmp_path, step):
  ids = tmp_path / "sample_ids.jsonl"
  arguments = "train.py", STAGES, f"--workdir={tmp_path}", f"--config.distillation.teacher={teacher}"
  kill_when(runs.start(*arguments), lambda: ids.exists() and len(ids.read_text().splitlines()) >= step)
  assert "from step" in train(tmp_path, teacher)
  runs.assert_same_bits(runs.final_state(tmp_path), runs.final_state(undisturbed))
  assert ids.read_text() == (undisturbed / "sample_ids.jsonl").read_text()
  np.testing.assert_array_equal(runs.losses(tmp_path), runs.losses(undisturbed))


def test_another_mesh_and_accumulation_end_close_by(undisturbed, teacher, tmp_path):
  arguments = "--config.mesh.fsdp=2", "--config.mesh.data=1"
  runs.run(
    "train.py", STAGES, f"--workdir={tmp_path}", f"--config.distillation.teacher={teacher}", *arguments, devices=2
  )
  runs.assert_close(runs.final_state(tmp_path), runs.final_state(undisturbed), 1e-4)
