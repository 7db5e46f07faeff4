"""The term of strong views: against NumPy in float64, on any mesh, and through the towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax.batch import StrongViews
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.outputs import STRONG_IMAGE, STRONG_TEXT
from contrastive_jax.objectives import TERMS, Pairs, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of
from tests.training import accumulating

PAIRS, VIEWS, DIM, SMOOTHING = 8, 2, 4, 0.1
GROUP = np.array([0, 1, 2, 3, 4, 1, 6, 7])
# The number of each changed caption: pairs 2 and 3 have the same one in their second view, by chance.
CAPTIONS = np.arange(PAIRS * VIEWS).reshape(PAIRS, VIEWS)
CAPTIONS[3, 1] = CAPTIONS[2, 1]


def reference(params, image, text):
  """Perceptrons with batch norm, then cross-entropies with smoothed labels, by loops over the pairings of views."""

  def head(layers, x):
    for name in ("layer1", "layer2"):
      x = x @ layers[name]["kernel"]
      x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) * layers[name]["scale"] + layers[name]["bias"]
      x = np.maximum(x, 0)
    x = x @ layers["layer3"]["kernel"] + layers["layer3"]["bias"]
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  def cross_entropy(logits, classes):
    """Each label keeps 0.9 and gets its part of the 0.1 that all classes share."""
    targets = (1 - SMOOTHING) * np.eye(PAIRS) + SMOOTHING * classes / classes.sum(1, keepdims=True)
    logits = np.where(classes, logits, -np.inf)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(targets * np.where(classes, log_probabilities, 0)).sum(1).mean()

  losses = []
  for i in range(VIEWS):
    for k in range(VIEWS):
      logits = (
        np.exp(params["log_logit_scale"]) * head(params["image"], image[:, i]) @ head(params["text"], text[:, k]).T
      )
      alike = (GROUP[:, None] == GROUP) | (CAPTIONS[:, None, k] == CAPTIONS[:, k])
      classes = ~alike | np.eye(PAIRS, dtype=bool)
      losses += [cross_entropy(logits, classes), cross_entropy(logits.T, classes)]
  return np.mean(losses)


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  term = TERMS["strong_views"](hidden=6)
  learned = term.params(Sizes(DIM))
  params = jax.device_get(create({"": learned}, jax.random.key(1))[""])
  params = jax.tree.map(lambda leaf: np.float64(leaf) + 0.1 * rng.normal(size=leaf.shape), params)
  return term, params, *rng.normal(size=(2, PAIRS, VIEWS, DIM))


def differentiated(term, arrays, devices):
  caption_keys = np.stack([CAPTIONS, np.ones_like(CAPTIONS)], axis=-1).astype(np.uint32)
  split, axes = PartitionSpec(BATCH_AXES), BATCH_AXES if devices else None

  def local(params, image, text, keys, caption_keys):
    side = jnp.zeros((len(image), DIM))
    strong = {"strong_image": image, "strong_text": text, "strong_keys": caption_keys}
    return term(Pairs(side, side, keys, 1.0, **strong), params, {}, axis_name=axes)[0]

  function = local
  if devices:
    mesh = MeshSpec(fsdp=2).make(jax.devices()[:devices])
    specs = (PartitionSpec(), split, split, split, split)
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
  return jax.jit(jax.value_and_grad(function, argnums=range(3)))(*arrays, keys_of(GROUP), caption_keys)


@pytest.mark.parametrize("devices", [pytest.param(0, marks=(pytest.mark.slow, pytest.mark.extra)), 4])
def test_value_and_gradients_are_numpys_on_any_number_of_devices(problem, devices):
  term, *arrays = problem
  truth = reference(*arrays)
  # How the value changes along one direction of everything that is differentiated, by central differences.
  rng = np.random.default_rng(1)
  direction = jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), tuple(arrays))

  def moved(by):
    return reference(*jax.tree.map(lambda leaf, along: leaf + by * along, tuple(arrays), direction))

  with jax.enable_x64(True):
    value, gradients = differentiated(term, arrays, devices)
    assert float(value) == pytest.approx(truth, rel=1e-6)
    slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True))
    assert float(slope) == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-4)


def test_it_stands_beside_a_term_that_keeps_the_models_own_embeddings_apart():
  with pytest.raises(UserError, match="strong_views has no term that keeps embeddings apart"):
    make_objective({"strong_views": 1.0}, {})
  objective = make_objective({"softmax": 1.0, "strong_views": 2.0}, {"strong_views": {"views": 3}})
  assert (objective.strong_images, objective.strong_texts) == (3, 3)
  assert make_objective({"softmax": 1.0}, {}).strong_images == 0


@pytest.mark.parametrize("packed", [pytest.param(False, marks=(pytest.mark.slow, pytest.mark.extra)), True])
def test_the_towers_embed_each_view_as_they_embed_it_alone(packed):
  rng, pairs = np.random.default_rng(3), 4
  spec = accumulating.make_spec()
  batch = accumulating.make_batch(rng, pairs, packed)
  rows, length, patch = batch.image.patches.shape
  tokens = rng.integers(0, 19, (pairs, VIEWS, accumulating.LENGTH), np.int32)
  mask = np.arange(accumulating.LENGTH) < rng.integers(1, accumulating.LENGTH + 1, (pairs, VIEWS, 1))
  strong = StrongViews(rng.integers(0, 256, (rows, VIEWS, length, patch), np.uint8), tokens, mask)
  graphdef, shapes = dual_encoder.abstract(spec.model)
  params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.standard_normal(leaf.shape)), shapes)

  @jax.jit
  def together_and_alone(params, batch):
    model = dual_encoder.merge(graphdef, params)
    found = model(batch)
    alone = []
    for view in range(VIEWS):
      image = dataclasses.replace(batch.image, patches=batch.strong.patches[:, view])
      text = model.text(batch.strong.tokens[:, view], batch.strong.mask[:, view])
      alone.append((model.image(image).pooled, text.pooled))
    return [found[name].pooled for name in (STRONG_IMAGE, STRONG_TEXT)], alone

  found, alone = together_and_alone(params, dataclasses.replace(batch, strong=strong))
  for together, views in zip(found, zip(*alone, strict=True), strict=True):
    expected = np.stack(views, axis=1)
    np.testing.assert_allclose(together.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("packed", [False, True])
def test_accumulated_gradients_equal_those_of_the_batch_in_one_piece(packed):
  rng, pairs, length = np.random.default_rng(4), accumulating.PAIRS, accumulating.LENGTH
  batch = accumulating.make_batch(rng, packed=packed)
  tokens = rng.integers(0, 19, (pairs, VIEWS, length), np.int32)
  mask = np.arange(length) < rng.integers(1, length + 1, (pairs, VIEWS, 1))
  rows, *patches = batch.image.patches.shape
  views = rng.integers(0, 256, (rows, VIEWS, *patches), np.uint8)
  strong = StrongViews(views, tokens, mask, rng.integers(0, 99, (pairs, VIEWS, 2), np.uint32))
  batch = dataclasses.replace(batch, strong=strong)
  objective = make_objective({"softmax": 1.0, "strong_views": 2.0}, {"strong_views": {"hidden": 8}})

  def differentiated(devices, accumulate):
    spec = dataclasses.replace(accumulating.make_spec(devices), objective=objective)
    learned = create(objective.params(Sizes(16, model=spec.model)), jax.random.key(2))
    return accumulating.differentiate(spec, batch, accumulate, learned)

  expected = differentiated(1, 1)
  assert np.isfinite(expected[1]["loss"])
  # Standardised features of 64 pairs magnify rounding.
  accumulating.assert_equal(differentiated(4, 2), expected, tolerance=1e-4)
