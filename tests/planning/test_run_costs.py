"""What a run costs: its steps by kind of batch, what they add up to, and how that is written."""

import io
import json

import pytest
from rich.console import Console

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.planning import report, run_costs
from contrastive_jax.planning.compiling import kinds_of_batch, steps_of
from contrastive_jax.planning.plan import steps_in
from contrastive_jax.planning.run_costs import Steps
from contrastive_jax.training.run import Run
from tests import tiny, tiny_stages


def test_every_step_is_of_one_kind():
  config = tiny_stages.get_config()
  config.objective = {"sigmoid": 1.0}
  lengths = common.stage("lengths", 9, mode="naflex", lengths=(16, 25, 36))
  config.curriculum, config.total_steps = (lengths, *config.curriculum), 25
  run = Run.from_config(config)
  steps = {kind: steps_of(run, kind) for kind in kinds_of_batch(run)}
  assert {kind: steps[kind] for kind in steps if kind.startswith("lengths")} == dict.fromkeys(
    ("lengths:16", "lengths:25", "lengths:36"), 3
  )
  clips = sum(run.segments[-1].modality_at(offset)[0] == "clip" for offset in range(6))
  assert (steps["fixed"], steps["video/clip"], steps["video"]) == (5, clips, 6 - clips)
  assert sum(steps.values()) == 25


def test_stages_of_one_name_cannot_be_told_apart():
  config = tiny.get_config()
  config.curriculum = (common.stage("a", 10), common.stage("a", 0))
  with pytest.raises(UserError, match="two stages of the curriculum are named 'a'"):
    kinds_of_batch(Run.from_config(config))


def written(cost):
  console = Console(width=120, record=True, file=io.StringIO())
  console.print(report.render_cost(cost))
  return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_hours_and_money_add_up():
  stages = [Steps("small", 195_500, 65_536, 1.5), Steps("large", 8_000, 16_384, 2.25)]
  found = run_costs.cost(stages, 256, 1.2)
  # By hand: 195500 * 1.5 / 3600 hours, and 5 of 8000 * 2.25 s.
  hours = 81.4583333, 5.0
  assert [stage["hours"] for stage in found["stages"]] == pytest.approx(hours)
  assert found["total"]["chip_hours"] == pytest.approx(256 * sum(hours))
  assert found["total"]["price"] == pytest.approx(1.2 * 256 * sum(hours))
  assert found["total"]["pairs"] == 195_500 * 65_536 + 8_000 * 16_384
  assert json.loads(json.dumps(found)) == found
  lines = written(found)
  assert "small 195,500 12.81 billion 81.5 20,853 25,024" in lines
  assert "together 203,500 12.94 billion 86.5 22,133 26,560" in lines
  assert any(run_costs.LEFT_OUT.split(",")[0] in line for line in lines)


def test_what_is_not_known_is_not_added():
  plan = {"stage": None, "config": "tiny", "steps": 40, "batch_size": 32, "time": {"estimate": None}}
  one = steps_in(plan)
  assert one == Steps("tiny", 40, 32, None)
  misfit = steps_in({name: value for name, value in plan.items() if name != "time"})  # A step that does not fit.
  found = run_costs.cost([one, misfit, Steps("b", 10, 32, 1.0)], 8)
  assert found["total"] == {"steps": 90, "pairs": 2880, "hours": None, "chip_hours": None}
  assert "together 90 2,880 unknown unknown" in written(found)
