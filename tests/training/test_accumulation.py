"""Accumulated gradients equal those of the batch in one piece, noise included, for the memory of one micro-batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.objectives import LocalTerm, Objective, make_objective
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.training.run import Run
from contrastive_jax.training.step import make_value_and_grad
from tests import tiny
from tests.training.accumulating import LENGTH, assert_equal, differentiate, make_batch, make_spec, params_of


class WordAlignment(LocalTerm):
  """A local term whose count differs between micro-batches: alignment weighted by the words of a caption."""

  def total(self, model, outputs, batch, params):
    image, text = outputs["image"].embedding, outputs["text"].embedding
    return jnp.sum(jnp.sum((image - text) ** 2, axis=1) * jnp.sum(batch.text.mask, axis=1))

  def count(self, batch):
    return jnp.sum(batch.text.mask).astype(jnp.float32)


class NextToken(LocalTerm):
  """A local term that reads the states of tokens and parameters of a tower: each state predicts the token after it."""

  def total(self, model, outputs, batch, params):
    states, following = outputs["text"].states[:, :-1], batch.text.tokens[:, 1:]
    logits = jnp.einsum("rlw,vw->rlv", states, model.text.tokens[...], precision="highest")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    patches = jnp.sum(jnp.square(outputs["image"].states))
    return jnp.sum(losses * batch.text.mask[:, 1:]) + 0.01 * patches

  def count(self, batch):
    return jnp.sum(batch.text.mask[:, 1:]).astype(jnp.float32)


@functools.cache
def objective_of(name):
  if name == "states":
    return Objective({**make_objective({"sigmoid": 1.0}, {}).terms, "next_token": (0.5, NextToken())})
  if name == "several":
    both = make_objective({"softmax": 0.5, "sigmoid": 1.0, "alignment": 2.0}, {"softmax": {"label_smoothing": 0.1}})
    return Objective({**both.terms, "words": (0.7, WordAlignment())})
  return make_objective({name: 1.0}, {})


@pytest.fixture(scope="module")
def in_one_piece():
  @functools.cache
  def run(name, packed=False):
    batch = make_batch(np.random.default_rng(1), packed=packed)
    return batch, differentiate(make_spec(objective=objective_of(name)), batch, accumulate=1)

  return run


@pytest.mark.parametrize(
  ("name", "devices", "fsdp", "accumulate"),
  [
    pytest.param("softmax", 1, 1, 4, marks=(pytest.mark.slow, pytest.mark.extra)),
    pytest.param("states", 1, 1, 8, marks=pytest.mark.slow),
    pytest.param("softmax", 8, 1, 8, marks=pytest.mark.slow),
    pytest.param("sigmoid", 8, 4, 2, marks=(pytest.mark.slow, pytest.mark.extra)),
    pytest.param("several", 8, 4, 4, marks=pytest.mark.slow),
  ],
)
def test_gradients_equal_those_of_the_batch_in_one_piece(name, devices, fsdp, accumulate, in_one_piece):
  batch, expected = in_one_piece(name)
  got = differentiate(make_spec(devices, fsdp, objective=objective_of(name)), batch, accumulate)
  assert_equal(got, expected, tolerance=1e-5)
  kernel = got[0]["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // fsdp


def test_the_noise_is_on(in_one_piece):
  """Or the tests above would prove nothing about its replay."""
  batch, (noisy, _) = in_one_piece("softmax")
  quiet, _ = differentiate(make_spec(dropout=0.0, drop_path=0.0), batch, accumulate=1)
  one, other = (tree["text"]["transformer"]["blocks"]["mlp"]["up"]["kernel"] for tree in (noisy, quiet))
  assert np.abs(one - other).max() > 0.1 * np.abs(other).max()


def test_packed_rows_are_cut_with_their_pairs(in_one_piece):
  batch, expected = in_one_piece("softmax", packed=True)
  assert_equal(differentiate(make_spec(devices=2), batch, 4), expected, tolerance=1e-5)


@pytest.mark.slow
def test_mixed_precision_accumulates_in_float32(in_one_piece):
  batch, _ = in_one_piece("sigmoid")
  spec = make_spec(dtype="bfloat16", objective="sigmoid")
  gradients, metrics = differentiate(spec, batch, 8)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
  # A micro-batch's gradient of a kernel is one bfloat16 product: 8 bits each.
  assert_equal((gradients, metrics), differentiate(spec, batch, 1), tolerance=2**-6)


def test_alignment_is_the_mean_squared_distance(rng):
  image, text = jnp.asarray(rng.standard_normal((2, 6, 3)), jnp.float32)
  objective = objective_of("several")
  batch = make_batch(rng, pairs=6)
  outputs = {name: TowerOutputs(side, None, None) for name, side in (("image", image), ("text", text))}
  model = dual_encoder.merge(dual_encoder.abstract(make_spec().model)[0], params_of(make_spec().model))
  _, metrics = objective.local_loss(model, outputs, batch, objective.counts(batch))
  assert metrics["loss_alignment"] == pytest.approx(np.mean(np.sum(np.subtract(image, text) ** 2, axis=1)), rel=1e-6)


def peak_temporaries(objective, pairs, accumulate):
  spec = make_spec(remat="none", objective=objective_of(objective))
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(np.random.default_rng(0), pairs)))
  run = jax.jit(make_value_and_grad(spec, accumulate=accumulate))
  lowered = run.lower(spec.abstract().params, {}, batch, jax.random.key(0))
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param("sigmoid", marks=pytest.mark.extra), "states"])
def test_memory_is_that_of_one_micro_batch_and_the_embeddings(objective):
  small, whole, cut = (peak_temporaries(objective, pairs, count) for pairs, count in ((64, 1), (1024, 1), (1024, 16)))
  parameters = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dual_encoder.abstract(make_spec().model)[1]))
  # Of both towers, as made, as the loss reads them, and their gradients in both orders.
  embeddings = 2 * 4 * 1024 * 16 * 4
  logits = 3 * 1024**2 * 4  # One tile, which does not grow further: tests/losses measure that.
  inputs = 1024 * (4 * 48 + 4 * 6 + LENGTH * 5 + 4)
  assert whole > 6 * small
  assert cut < small + embeddings + 2 * parameters + logits + inputs


def test_pairs_that_do_not_divide_are_named():
  config = tiny.get_config()
  config.accumulation = 3
  with pytest.raises(
    UserError, match=r"accumulation=3 does not divide the 4 pairs of each of 8 devices.*multiple of 24"
  ):
    Run.from_config(config).build(MeshSpec().make())
