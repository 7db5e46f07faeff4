"""The logit bias from the first batch is where the sigmoid loss is smallest in it, on any mesh and in micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.objectives import make_objective
from contrastive_jax.training.balancing import with_balanced_bias
from contrastive_jax.training.run import Run
from tests import tiny
from tests.training.accumulating import make_batch, make_spec


def spec_of(devices):
  spec = make_spec(devices, fsdp=min(2, devices))
  objective = make_objective({"sigmoid": 1.0}, {"sigmoid": {"balance_bias": True}})
  return dataclasses.replace(spec, objective=objective, average=True)


@pytest.mark.parametrize(
  ("devices", "accumulate", "some"),
  [
    pytest.param(1, 1, False, marks=(pytest.mark.slow, pytest.mark.extra)),
    pytest.param(4, 2, True, marks=pytest.mark.slow),
  ],
)
def test_the_bias_is_where_the_loss_is_smallest(devices, accumulate, some, rng):
  """In a whole batch, and in one of which the term sees some pairs."""
  spec, batch = spec_of(devices), make_batch(rng)
  present = rng.random(len(batch.keys)) < 0.7 if some else np.ones(len(batch.keys), bool)
  if some:
    batch = dataclasses.replace(batch, present_in={"sigmoid": present})
  state = jax.device_get(with_balanced_bias(spec, spec.create(0), batch, accumulate=accumulate))
  bias = state.params["logit_bias"]
  assert bias == state.average["logit_bias"] and -10 < bias < 0
  graphdef, _ = dual_encoder.abstract(spec.model)
  outputs = dual_encoder.merge(graphdef, jax.tree.map(jnp.asarray, state.params))(jax.tree.map(jnp.asarray, batch))
  image, text = (np.float64(outputs[name].embedding)[present] for name in ("image", "text"))
  chances = 1 / (1 + np.exp(-(np.exp(np.float64(state.params["log_logit_scale"])) * image @ text.T + bias)))
  own, keys = np.eye(len(image), dtype=bool), np.asarray(batch.keys)[present]
  counts = own | ~(keys[:, None] == keys[None]).all(-1).any(-1)
  # The derivative by the bias is how many pairs are expected to match beyond those that do. A step of Newton's from
  # there is within the rounding of the sums.
  slope, curvature = (np.sum(part[counts]) for part in (chances - own, chances * (1 - chances)))
  assert curvature > 1 and abs(slope / curvature) < 1e-4


@pytest.mark.slow
@pytest.mark.extra
def test_a_batch_without_a_pair_of_the_term_leaves_the_bias_where_it_is(rng):
  spec, batch = spec_of(1), make_batch(rng)
  state = spec.create(0)
  before = float(state.params["logit_bias"])
  batch = dataclasses.replace(batch, present_in={"sigmoid": np.zeros(len(batch.keys), bool)})
  assert float(with_balanced_bias(spec, state, batch).params["logit_bias"]) == before


def test_a_model_without_a_bias_has_none_to_balance():
  config = tiny.get_config()
  config.loss, config.loss_options.sigmoid.balance_bias = "sigmoid", True
  with config.unlocked():
    config.model.init_logit_bias = None
  with pytest.raises(UserError, match=r"^loss_options\.sigmoid\.balance_bias=True needs a logit bias"):
    Run.from_config(config)
  with pytest.raises(UserError, match=r"^loss_options\.sigmoid\.balance_bias=True is for images and texts alone"):
    make_objective({"sigmoid": 1.0}, {"sigmoid": {"balance_bias": True, "towers": ("image", "sound")}})
