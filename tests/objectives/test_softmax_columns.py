"""The softmax term with weights of pairs and wrong captions: against a dense formula, and through the train step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax.batch import HardCaptions
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import TERMS, Pairs, make_objective
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of
from tests.training import accumulating

PAIRS, DIM, CAPTIONS, SCALE = 8, 5, 3, 6.0
OPTIONS = {"pair_weights": True, "hard_captions": 2, "label_smoothing": 0.1, "tile": 3}


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def dense(image, text, hard, scale, there, weights, others):
  """Each cross-entropy as a softmax over the texts and, without any smoothing, the wrong captions of the image."""
  total = 0.0
  extra = jnp.where(there, scale * jnp.einsum("id,ikd->ik", image, hard), -jnp.inf)
  for logits, more in ((scale * image @ text.T, extra), (scale * text @ image.T, extra[:, :0])):
    classes = others | jnp.eye(len(logits), dtype=bool)
    whole = jnp.concatenate([jnp.where(classes, logits, -jnp.inf), more], axis=1)
    average = jnp.sum(jnp.where(classes, logits, 0), axis=1) / classes.sum(1)
    lines = jax.nn.logsumexp(whole, axis=1) - 0.9 * jnp.diag(logits) - 0.1 * average
    total += jnp.sum(weights * lines) / jnp.sum(weights) / 2
  return total


@pytest.mark.parametrize("devices", [0, 4])
def test_value_and_gradients_equal_a_dense_formula(devices):
  rng = np.random.default_rng(2)
  image, text = unit(rng.normal(size=(2, PAIRS, DIM)))
  hard, there = unit(rng.normal(size=(PAIRS, CAPTIONS, DIM))), rng.random((PAIRS, CAPTIONS)) < 0.6
  there[0], there[1] = False, True
  weights = np.where(np.arange(PAIRS) == 3, 0.0, rng.uniform(0.2, 2, PAIRS))
  group = np.array([0, 1, 2, 3, 4, 5, 1, 7])
  others, keys = group[:, None] != group, keys_of(group)
  axes = {"axis_name": BATCH_AXES if devices else None, "ring_order": None}

  def local(image, text, hard, scale, there, weights, keys):
    pairs = Pairs(image, text, keys, scale, weights=weights, hard_text=hard, hard_there=there)
    return TERMS["softmax"](**OPTIONS)(pairs, {}, {}, **axes)[0]

  function = local
  if devices:
    split = PartitionSpec(BATCH_AXES)
    specs = (split, split, split, PartitionSpec(), split, split, split)
    mesh = MeshSpec(fsdp=2).make(jax.devices()[:devices])
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
  with jax.enable_x64(True):
    sides = [jnp.asarray(side) for side in (image, text, hard, SCALE)]
    found = jax.jit(jax.value_and_grad(function, argnums=range(4)))(*sides, there, weights, keys)
    # A term reads as many as it asks for of what the batch brings.
    some = there & (np.arange(CAPTIONS) < 2)
    truth = jax.jit(jax.value_and_grad(dense, argnums=range(4)))(*sides, some, weights, others)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12), found, truth)


def test_mistakes_are_named():
  with pytest.raises(UserError, match="hard_captions=1 are negatives of images beside all texts"):
    make_objective({"softmax": 1.0}, {"softmax": {"hard_captions": 1, "hard_top_k": 4}})
  objective = make_objective({"matryoshka": 1.0}, {"matryoshka": {"of": "softmax"}, "softmax": {"hard_captions": 2}})
  assert objective.captions_needed == 2


@pytest.mark.slow
def test_accumulated_gradients_equal_those_of_the_batch_in_one_piece():
  rng, pairs, length = np.random.default_rng(4), accumulating.PAIRS, accumulating.LENGTH
  tokens = rng.integers(0, 19, (pairs, 2, length), np.int32)
  mask = np.arange(length) < rng.integers(1, length + 1, (pairs, 2, 1))
  batch = dataclasses.replace(
    accumulating.make_batch(rng),
    weights=rng.uniform(0, 1, pairs).astype(np.float32),
    hard_captions=HardCaptions(tokens, mask, rng.random((pairs, 2)) < 0.7),
  )

  def differentiated(devices, accumulate):
    spec = accumulating.make_spec(devices)
    objective = make_objective({"softmax": 1.0}, {"softmax": OPTIONS})
    return accumulating.differentiate(dataclasses.replace(spec, objective=objective), batch, accumulate)

  expected = differentiated(1, 1)
  accumulating.assert_equal(differentiated(4, 2), expected, tolerance=1e-5)
  without = accumulating.differentiate(accumulating.make_spec(), batch, 1)
  assert abs(without[1]["loss"] - expected[1]["loss"]) > 1e-3
