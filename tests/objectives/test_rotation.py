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
from tests.training import test_accumulation


def test_turned_patches_are_those_of_the_turned_image():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
  found = turned(jnp.asarray(patchify(pixels, 4).patches), 4)
  for turns in range(4):
    np.testing.assert_array_equal(found[:, turns], patchify(np.rot90(pixels, turns, axes=(1, 2)), 4).patches)


def test_it_is_the_cross_entropy_of_the_images_that_take_part():
  pairs, every = 8, 4
  spec = test_accumulation.make_spec()
  batch = test_accumulation.make_batch(np.random.default_rng(1), pairs)
  model = dual_encoder.merge(dual_encoder.abstract(spec.model)[0], test_accumulation.params_of(spec.model))
  term = TERMS["rotation"](every=every, hidden=(6, 5))
  params = create({"": term.params(Sizes(16, model=spec.model))}, jax.random.key(0))[""]
  expected = []
  for pair in range(0, pairs, every):
    for turns in range(4):
      # The image tower, on one image that NumPy turned.
      pixels = np.asarray(batch.image.patches[pair]).reshape(2, 2, 4, 4, 3).swapaxes(1, 2).reshape(8, 8, 3)
      image = patchify(np.ascontiguousarray(np.rot90(pixels, turns))[None], 4)
      x = np.float64(model.image(image).pooled[0])
      for name in ("layer1", "layer2", "layer3"):
        x = x @ np.float64(params[name]["kernel"]) + params[name]["bias"]
        x = np.maximum(x, 0) if name != "layer3" else x
      expected.append(np.log(np.exp(x).sum()) - x[turns])
  found = term.total(model, {}, batch, params) / term.count(batch)
  assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)
  blind = jax.tree.map(jnp.zeros_like, params)
  assert float(term.total(model, {}, batch, blind) / term.count(batch)) == pytest.approx(np.log(4))
  some = dataclasses.replace(batch, present=np.arange(pairs) < every)
  assert float(term.total(model, {}, some, params) / term.count(some)) == pytest.approx(np.mean(expected[:4]), rel=1e-4)
  with pytest.raises(UserError, match=r"rotation\.every=3 does not divide the 8 pairs"):
    TERMS["rotation"](every=3).total(model, {}, batch, params)


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
  batch = test_accumulation.make_batch(np.random.default_rng(2))

  def differentiated(devices, accumulate):
    spec = dataclasses.replace(test_accumulation.make_spec(devices), objective=objective)
    learned = create(objective.params(Sizes(16, model=spec.model)), jax.random.key(2))
    return test_accumulation.differentiate(spec, batch, accumulate, learned)

  test_accumulation.assert_equal(differentiated(4, 2), differentiated(1, 1), tolerance=1e-5)
