"""The term of rotations: turned images, its value against NumPy, and its gradients on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.objectives import TERMS, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.objectives.rotation import turned
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.training.run import Run
from tests.training import accumulating


def test_turned_patches_are_those_of_the_turned_image():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
  found = turned(jnp.asarray(patchify(pixels, 4).patches), 4)
  for turns in range(4):
    np.testing.assert_array_equal(found[:, turns], patchify(np.rot90(pixels, turns, axes=(1, 2)), 4).patches)


def test_it_is_the_cross_entropy_of_the_images_that_take_part():
  pairs, every = 8, 4
  spec = accumulating.make_spec()
  batch = accumulating.make_batch(np.random.default_rng(1), pairs)
  graphdef, shapes = dual_encoder.abstract(spec.model)
  rng = np.random.default_rng(3)
  towers = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.standard_normal(leaf.shape)), shapes)
  term = TERMS["rotation"](every=every, hidden=(6, 5))
  params = create({"": term.params(Sizes(16, model=spec.model))}, jax.random.key(0))[""]
  # The images that take part, which NumPy turns.
  pixels = batch.image.patches[::every].reshape(-1, 2, 2, 4, 4, 3).swapaxes(2, 3).reshape(-1, 8, 8, 3)
  turns = patchify(np.concatenate([np.rot90(pixels, turns, axes=(1, 2)) for turns in range(4)]), 4)

  @jax.jit
  def values(towers, params, batch, turns):
    model = dual_encoder.merge(graphdef, towers)
    blind = jax.tree.map(jnp.zeros_like, params)
    batches = batch, batch, dataclasses.replace(batch, present=jnp.arange(pairs) < every)
    found = [term.total(model, {}, b, p) / term.count(b) for b, p in zip(batches, (params, blind, params), strict=True)]
    return found, model.image(turns).pooled

  (whole, blind, first), features = values(towers, params, batch, turns)
  x = np.float64(features)
  for name in ("layer1", "layer2", "layer3"):
    x = x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])
    x = np.maximum(x, 0) if name != "layer3" else x
  expected = (np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), np.repeat(range(4), 2)]).reshape(4, 2)
  assert float(whole) == pytest.approx(expected.mean(), rel=1e-4)
  assert float(first) == pytest.approx(expected[:, 0].mean(), rel=1e-4)
  assert float(blind) == pytest.approx(np.log(4))
  with pytest.raises(UserError, match=r"rotation\.every=3 does not divide the 8 pairs"):
    TERMS["rotation"](every=3).total(None, {}, batch, params)


def test_other_images_than_squares_are_refused():
  config = common.get_config()
  config.data.sources = {"noto": 1.0}
  config.objective = {"sigmoid": 1.0, "rotation": 0.3}
  Run.from_config(config)
  config.curriculum = (common.stage("wide", 0, mode="native", max_tokens=64),)
  with pytest.raises(
    UserError, match=r"stage 'wide' shows images of any shape, and rotation needs squares: set .*0\.mode"
  ):
    Run.from_config(config)


@pytest.mark.slow
@pytest.mark.extra
def test_accumulated_gradients_equal_those_of_the_batch_in_one_piece():
  objective = make_objective({"softmax": 1.0, "rotation": 0.5}, {"rotation": {"hidden": (8, 8)}})
  batch = accumulating.make_batch(np.random.default_rng(2))

  def differentiated(devices, accumulate):
    spec = dataclasses.replace(accumulating.make_spec(devices), objective=objective)
    learned = create(objective.params(Sizes(16, model=spec.model)), jax.random.key(2))
    return accumulating.differentiate(spec, batch, accumulate, learned)

  accumulating.assert_equal(differentiated(4, 2), differentiated(1, 1), tolerance=1e-5)
