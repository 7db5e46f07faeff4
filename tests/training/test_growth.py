"""What becomes of the learning rate when a run grows, against closed forms and against what a resumed run sees."""

import dataclasses
import json
import math

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.training import growth
from contrastive_jax.training.growth import Growth
from contrastive_jax.training.run import Run
from tests import runs, tiny

PEAK, WARMUP, END = 1e-3, 4, 0.1


def make(total=40, name="cosine", end=END, way="hold", cooldown=0):
  config = tiny.get_config()
  config.total_steps, config.optimizer.learning_rate = total, PEAK
  config.schedule.update(
    {"name": name, "warmup_steps": WARMUP, "end_factor": end, "cooldown_steps": cooldown, "on_growth": way}
  )
  return config


def cosine(step, total, end=END):
  if step < WARMUP:
    return PEAK * (step + 1) / WARMUP
  progress = min((step - WARMUP) / (total - WARMUP), 1)
  return PEAK * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def rates(config, plans, stop):
  schedule = Run.from_config(config).schedule(plans)
  return np.array([schedule(step) for step in range(stop)])


CLOSED = {
  "hold": lambda step: cosine(step, 40) if step < 40 else PEAK * END,
  "restart": lambda step: cosine(step, 40) if step < 40 else cosine(step - 40, 24),
  "stretch": lambda step: cosine(step, 64),
}


@pytest.mark.parametrize("way", growth.WAYS)
def test_rates_of_a_run_that_grew_are_closed_forms(way):
  config = make(64, way=way)
  found = rates(config, (Growth(40), Growth(64, way)), 64)
  np.testing.assert_allclose(found, [CLOSED[way](step) for step in range(64)], rtol=2e-5)


@pytest.mark.parametrize("way", ["hold", "restart"])
def test_steps_that_were_planned_keep_their_rates(way):
  """Bit for bit, so that a run may grow before it is complete."""
  before = rates(make(40), (), 40)
  np.testing.assert_array_equal(rates(make(64), (Growth(40), Growth(64, way)), 40), before)


def test_a_run_may_grow_several_times():
  plans = (Growth(40), Growth(64, "restart"), Growth(80, "hold"), Growth(100, "restart"))
  found = rates(make(100), plans, 100)
  parts = [cosine(s, 40) for s in range(40)], [cosine(s, 24) for s in range(24)], [PEAK * END] * 16
  expected = np.concatenate([*parts, [cosine(s, 20) for s in range(20)]])
  np.testing.assert_allclose(found, expected, rtol=2e-5)
  np.testing.assert_allclose(
    rates(make(100), (*plans[:2], Growth(100, "stretch")), 100), [cosine(s, 100) for s in range(100)], rtol=2e-5
  )


def test_plans_are_recorded_and_read_back():
  about = {"plans": [dataclasses.asdict(Growth(40)), dataclasses.asdict(Growth(64, "restart"))]}
  about = json.loads(json.dumps(about))
  assert Run.from_config(make(64, way="hold")).growths(about) == (Growth(40), Growth(64, "restart"))
  assert Run.from_config(make(70, way="stretch")).growths(about) == (
    Growth(40),
    Growth(64, "restart"),
    Growth(70, "stretch"),
  )
  assert Run.from_config(make(64)).growths({}) == (Growth(64),)


def test_a_checkpoint_of_an_older_version_was_planned_for_the_steps_of_its_segments():
  about = {"segments": [{"steps": 30}, {"steps": 10}]}
  assert Run.from_config(make(40)).growths(about) == (Growth(40),)
  assert Run.from_config(make(64, way="restart")).growths(about) == (Growth(40), Growth(64, "restart"))


@pytest.mark.parametrize("name", ["constant", "rsqrt"])
def test_a_schedule_without_an_end_goes_on_as_it_is(name):
  config = make(64, name)
  plans = Run.from_config(config).growths({"segments": [{"steps": 40}]})
  assert plans == (Growth(64),)
  np.testing.assert_array_equal(rates(config, plans, 64), rates(config, (), 64))


@pytest.mark.parametrize(
  ("way", "said"),
  [
    ("hold", "is 0.0001 in step 40 and 0.0001 in step 41, and at most 0.0001"),
    ("restart", "is 0.0001 in step 40 and 0.00025 in step 41, and at most 0.001"),
    ("stretch", "is 0.0001 in step 40 and 0.00041 in step 41, and at most 0.00041"),
  ],
)
def test_a_growth_is_announced_with_both_rates(way, said):
  config = make(64, way=way)
  plans = (Growth(40), Growth(64, way))
  sentence = growth.announced(lambda plans: Run.from_config(config).schedule(plans), plans, start=40)
  assert sentence.startswith(f"total_steps grew from 40 to 64 with schedule.on_growth='{way}': the learning rate ")
  assert said in sentence.replace("0.000102", "0.0001")


@pytest.mark.parametrize(
  ("name", "end", "cooldown"), [("cosine", 0.0, 0), ("linear", 0.0, 0), ("cooldown", 0.1, 5), ("rsqrt", 0.1, 5)]
)
def test_a_rate_of_zero_is_not_held_without_a_word(name, end, cooldown):
  config = make(64, name, end, cooldown=cooldown)
  plans = Run.from_config(config).growths({"segments": [{"steps": 40}]})
  with pytest.raises(UserError, match=r"the learning rate ends at 0: set schedule\.on_growth='restart'"):
    growth.announced(lambda plans: Run.from_config(config).schedule(plans), plans, start=40)


def test_a_restart_needs_room_for_its_warm_up():
  with pytest.raises(
    UserError, match=r"on_growth='restart' repeats the schedule over the 3 steps that are added to 40"
  ):
    Run.from_config(make(43)).schedule((Growth(40), Growth(43, "restart")))


def test_an_unknown_way_is_refused():
  with pytest.raises(UserError, match="did you mean 'restart'"):
    Run.from_config(make(way="restarts"))


@pytest.mark.slow
def test_a_run_that_grew_and_was_stopped_again_ends_with_the_same_bits(tmp_path):
  """The growth is recorded: what resumes it needs not say it, and may say something else."""
  first, grown = "--config.total_steps=8", "--config.total_steps=20"
  how = "--config.schedule.on_growth=restart"
  for name in ("once", "twice"):
    runs.train(tmp_path / name, first)
  output = runs.train(tmp_path / "once", grown, how)
  assert "total_steps grew from 8 to 20 with schedule.on_growth='restart'" in output
  process = runs.start("train.py", runs.TINY, f"--workdir={tmp_path / 'twice'}", grown, how)
  while not (tmp_path / "twice" / "checkpoints" / "16").exists():
    assert process.poll() is None
  process.kill()
  process.communicate()
  output = runs.train(tmp_path / "twice", grown, "--config.schedule.on_growth=stretch")
  assert "total_steps grew" not in output
  runs.assert_same_bits(runs.final_state(tmp_path / "twice"), runs.final_state(tmp_path / "once"))
  logged = [row["learning_rate"] for row in runs.rows(tmp_path / "twice" / "metrics.jsonl") if "learning_rate" in row]
  assert logged[8] < logged[11] and logged[8] == pytest.approx(1e-3 / 4, rel=1e-3)
