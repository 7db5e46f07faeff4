"""Every numeric field of a config has a range, shipped configs lie within it, and what lies outside is one sentence."""

import importlib.util
import json
import math

import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.training import config as run_config
from contrastive_jax.training import ranges
from tests import runs

SHIPPED = sorted(path.stem for path in (runs.ROOT / "configs").glob("*.py") if path.stem != "__init__")


def config_with(name, value):
  tree = json.loads(common.get_config().to_json())
  *parents, last = name.split(".")
  node = tree
  for parent in parents:
    node = node[parent]
  node[last] = value
  return tree


def numeric_fields():
  """Fields that hold numbers, or that may hold some and are None."""
  config = run_config.as_json(common.get_config())
  config["curriculum"] = [json.loads(common.stage("a", 1).to_json())]
  optional = [f"loss_options.{name}.tile" for name in ("sigmoid", "softmax")]
  return sorted({name for name, _ in ranges.numbers(config)} | set(optional))


@pytest.mark.parametrize("name", numeric_fields())
def test_every_numeric_field_has_a_range_and_refuses_what_is_no_number(name):
  assert ranges.range_of(name) is not None
  for value in (math.nan, math.inf, -math.inf):
    assert not ranges.range_of(name).holds(value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_lie_within_the_ranges(name):
  spec = importlib.util.spec_from_file_location("shipped", runs.ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if hasattr(module, "get_config"):
    ranges.check_ranges(run_config.as_json(module.get_config()))


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("optimizer.clip_norm", (-1, -1e-9)),
    ("optimizer.learning_rate", (0, -1e-3, math.nan)),
    ("optimizer.muon_learning_rate", (0, -0.1)),
    ("optimizer.weight_decay", (-1e-4, math.inf)),
    ("optimizer.b1", (1, -0.1, 1.5)),
    ("optimizer.b2", (1, math.nan)),
    ("optimizer.muon_beta", (1.0,)),
    ("optimizer.eps", (0, -1e-8)),
    ("optimizer.adafactor_decay", (0, 1.1)),
    ("schedule.timescale", (0, -5)),
    ("schedule.end_factor", (-0.1, 1.1)),
    ("schedule.warmup_steps", (-1,)),
    ("average_decay", (1, -0.5)),
    ("max_logit_scale", (0.5, math.inf)),
    ("model.vision.std", ([0.5, 0, 0.5], [58.4, 57.1, 57.4])),
    ("model.vision.mean", ([123.7, 116.3, 103.5], [-0.1, 0, 0])),
    ("model.init_logit_scale", (math.nan,)),
    ("model.text.transformer.dropout", (1, -0.1)),
    ("model.vision.transformer.norm_eps", (0, -1e-6)),
    ("model.vision.transformer.width", (0, -768)),
    ("loss_options.softmax.label_smoothing", (1, -0.1)),
    ("loss_options.distill_similarity.teacher_temperature", (0, -1)),
    ("data.augment.flip", (1.5, -0.1)),
    ("data.captions.english", (2, math.nan)),
    ("data.sources", ({"noto": 0}, {"noto": -1}, {"noto": math.nan}, {"a": {"name": "noto", "weight": -2}})),
    ("objective", ({"sigmoid": 0}, {"sigmoid": math.inf})),
    ("batch_size", (0, -8)),
    ("seed", (math.nan,)),
  ],
)
def test_what_lies_outside_is_one_sentence_with_the_field(name, values):
  for value in values:
    with pytest.raises(UserError, match=name) as refused:
      ranges.check_ranges(config_with(name, value))
    assert "must be" in str(refused.value)
    assert "\n" not in str(refused.value)
