"""Every numeric field of a config has a range, shipped configs lie within it, and what lies outside is one sentence."""

import importlib.util
import json
import math
import typing

import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.training import config as run_config
from contrastive_jax.training import fields, ranges
from tests import runs

SHIPPED = sorted(path.stem for path in (runs.ROOT / "configs").glob("*.py") if "def get_config()" in path.read_text())


def config_with(name, value):
  tree = json.loads(common.get_config().to_json())
  *parents, last = name.split(".")
  node = tree
  for parent in parents:
    node = node[parent]
  node[last] = value
  return tree


def numeric_fields(node=None, prefix=""):
  """Fields that may hold numbers by their type, those that are None by default included; `objective` by its terms."""
  for name, kind in (fields.known() if node is None else node).fields.items():
    full = f"{prefix}{name}"
    if isinstance(kind, fields.Node):
      yield from numeric_fields(kind.every, f"{full}.0.") if kind.every else numeric_fields(kind, f"{full}.")
    elif {int, float} & {kind, *typing.get_args(kind)}:
      yield full


def test_what_has_a_number_by_its_type_has_one_in_configs():
  """The types of the fields, which another test compares with the configs, miss no number."""
  config = run_config.as_json(common.get_config())
  config["curriculum"] = [json.loads(common.stage("a", 1).to_json())]
  assert {name for name, _ in ranges.numbers(config)} <= set(sorted(numeric_fields()))


@pytest.mark.parametrize(
  "name",
  [
    "new", "optimizer.new", "schedule.new", "data.new", "data.augment.new", "data.captions_new", "model.new",
    "model.image.new", "model.text.new", "model.image.transformer.new", "curriculum.0.new",
    "loss_options.softmax.new", "distillation.new", "tokenizer.new", "seeds", "batch_sizes",
  ],
)  # fmt: skip
def test_a_new_field_has_no_range_until_it_gets_one(name):
  """No row of the table is so wide that the tests above could not fail for a field that is added."""
  assert ranges.range_of(name) is None


@pytest.mark.parametrize("name", sorted(numeric_fields()))
def test_every_numeric_field_has_a_range_and_refuses_what_is_no_number(name):
  assert ranges.range_of(name) is not None
  for value in (math.nan, math.inf, -math.inf):
    assert not ranges.range_of(name).holds(value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_lie_within_the_ranges(name):
  spec = importlib.util.spec_from_file_location("shipped", runs.ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
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
    ("model.image.std", ([0.5, 0, 0.5], [58.4, 57.1, 57.4])),
    ("model.image.mean", ([123.7, 116.3, 103.5], [-0.1, 0, 0])),
    ("model.init_logit_scale", (math.nan,)),
    ("model.text.transformer.dropout", (1, -0.1)),
    ("model.image.transformer.norm_eps", (0, -1e-6)),
    ("model.image.transformer.width", (0, -768)),
    ("loss_options.softmax.label_smoothing", (1, -0.1)),
    ("loss_options.distill_similarity.teacher_temperature", (0, -1)),
    ("data.augment.flip", (1.5, -0.1)),
    ("data.captions.english", (2, math.nan)),
    ("data.sources", ({"noto": 0}, {"noto": -1}, {"noto": math.nan}, {"a": {"name": "noto", "weight": -2}})),
    ("objective", ({"sigmoid": 0}, {"sigmoid": math.inf})),
    ("batch_size", (0, -8)),
    ("seed", (math.nan, 2**32, -1, -(2**31) - 1)),
    # What is another number in float32: 1, 0 and infinity.
    ("optimizer.b2", (0.99999999,)),
    ("optimizer.eps", (1e-60,)),
    ("optimizer.learning_rate", (1e39, 1e-60)),
    ("average_decay", (1 - 1e-9,)),
    ("model.init_logit_scale", (1000.0, -math.inf)),
    ("model.init_logit_bias", (1e30,)),
    ("max_logit_scale", (1e30,)),
    ("total_steps", (2**31,)),
    ("data.augment.zoom", ([0, 1],)),
    ("data.augment.blur", (1.5,)),
    ("data.augment.zoom", ([1e-9, 1], [1, 1e9])),
    ("data.augment.saturation", ([1, 1e30],)),
    ("data.augment.stretch", (1e9,)),
    ("data.augment.shift", (100,)),
    ("data.workers", (10**6,)),
    ("data.threads", (10**9,)),
    ("data.max_bad_share", (-0.1, 1.1)),
    ("mesh.data", (-2,)),
  ],
)
def test_what_lies_outside_is_one_sentence_with_the_field(name, values):
  for value in values:
    with pytest.raises(UserError, match=name) as refused:
      ranges.check_ranges(config_with(name, value))
    assert "must be" in str(refused.value)
    # An infinite number lies above 0 and is refused all the same: the sentence says why.
    if value in (1e39, 1e-60, 0.99999999):
      assert "as the float32 that steps use" in str(refused.value)
    assert math.isfinite(value if isinstance(value, int | float) else 0) or "must be finite" in str(refused.value)
    assert "\n" not in str(refused.value)
