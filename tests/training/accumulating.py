"""Differentiates an objective through the towers of a small model, in one piece or accumulated, on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.objectives import make_objective
from contrastive_jax.parallel.mesh import MeshSpec, put_batch
from contrastive_jax.training.state import StateSpec
from contrastive_jax.training.step import make_value_and_grad
from tests.keys import keys_of

PAIRS, LENGTH = 64, 5
BLOCKS = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "dropout": 0.1, "drop_path": 0.3}


def make_spec(devices=1, fsdp=1, dtype="float32", objective="softmax", **blocks):
  """A small dual encoder on a mesh, with an objective or the name of its one term."""
  model = presets.resolve(
    "siglip_ti16",
    {
      "image": {"image_size": 8, "patch_size": 4, "transformer": {**BLOCKS, **blocks}},
      "text": {"vocab_size": 19, "length": LENGTH, "transformer": {**BLOCKS, "depth": 1, **blocks}},
      "embed_dim": 16,
    },
  )
  rules = MeshSpec(fsdp=fsdp)
  mesh = rules.make(jax.devices()[:devices])
  model = dataclasses.replace(model, dtype=dtype)
  objective = make_objective({objective: 1.0}, {}) if isinstance(objective, str) else objective
  return StateSpec(model, optax.sgd(1.0), frozen=(), average=False, mesh=mesh, rules=rules, objective=objective)


def make_batch(rng, pairs=PAIRS, packed=False):
  """Captions of 1 to `LENGTH` tokens; images of four patches, or two images of unequal length a row."""
  rows, length = (pairs // 2, 8) if packed else (pairs, 4)
  position = np.arange(length) % 4 if packed else np.arange(4)
  coords = np.stack([np.zeros(length), position // 2, position % 2], axis=1).astype(np.int16)
  segment_ids = np.tile(np.array([1, 1, 1, 1, 2, 2, 2, 0], np.int16), (rows, 1)) if packed else None
  locations = np.stack([np.arange(pairs) // 2, np.arange(pairs) % 2 + 1], axis=1).astype(np.int32) if packed else None
  image = ImageBatch(
    rng.integers(0, 256, (rows, length, 48), np.uint8), np.tile(coords, (rows, 1, 1)), segment_ids, locations
  )
  mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (pairs, 1))
  tokens = rng.integers(0, 19, (pairs, LENGTH), np.int32)
  return Batch(image, TextBatch(tokens, mask), keys_of(rng.integers(0, pairs // 2, pairs)))


@functools.cache
def params_of(model):
  """No parameter is zero: every one has a gradient that could go wrong."""
  rng = np.random.default_rng(0)
  params = jax.device_get(jax.jit(functools.partial(dual_encoder.init, model))(jax.random.key(0)))
  return jax.tree.map(lambda leaf: leaf + np.float32(0.05) * rng.standard_normal(leaf.shape, np.float32), params)


def differentiate(spec, batch, accumulate, learned=None, with_average=False):
  """Value, metrics and gradients of a step; `learned` is what the terms of the objective learn."""
  run = jax.jit(make_value_and_grad(spec, accumulate=accumulate))
  params = params_of(dataclasses.replace(spec.model, dtype="float32")) | ({"objective": learned} if learned else {})
  params = jax.device_put(params, spec.shardings().params)
  average = jax.tree.map(lambda leaf: 0.9 * leaf, params) if with_average else None
  arguments = put_batch(spec.mesh, batch), jax.random.key(7), None, None, average
  (loss, (metrics, _)), gradients = run(params, {}, *arguments)
  return gradients, {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}


def assert_equal(got, expected, tolerance):
  gradients, metrics = got
  truth, numbers = expected
  assert metrics == pytest.approx(numbers, rel=tolerance)
  # The keys' bias moves no softmax: its gradient is rounding, measured against the largest gradient of all.
  floor = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(truth))
  for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(truth), strict=True):
    bound = tolerance * max(np.abs(other).max(), floor)
    np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
