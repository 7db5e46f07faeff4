"""Terms that compare pairs in one objective, and the memory of their losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses
from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.objectives import make_objective
from contrastive_jax.parallel.mesh import MeshSpec, put_batch
from tests.keys import keys_of

PAIR_TERMS = (
  "dcl",
  "cwcl",
  "mann_whitney",
  "mv_infonce",
  "mv_dhel",
  "cacr",
  "groco",
  "gram",
  "mochi",
  "mixup",
  "soft_clip",
)


@pytest.mark.slow
def test_a_sum_of_all_terms_is_that_sum_and_teaches_both_towers():
  objective = make_objective(dict.fromkeys(PAIR_TERMS, 0.5), {"mochi": {"hardest": 4, "mixed": 3}})
  mesh = MeshSpec().make(jax.devices()[:2])
  rows = np.random.default_rng(0).standard_normal((2, 8, 4))
  image, text = (put_batch(mesh, np.float32(side / np.linalg.norm(side, axis=1, keepdims=True))) for side in rows)
  pixels = ImageBatch(np.zeros((8, 1, 3), np.uint8), np.zeros((8, 1, 3), np.int16))
  words = TextBatch(np.zeros((8, 1), np.int32), np.ones((8, 1), bool))
  batch = put_batch(mesh, Batch(pixels, words, keys_of(np.arange(8))))

  @jax.jit
  def run(embeddings, batch):
    loss = functools.partial(objective.global_loss, batch=batch, logit_scale=jnp.float32(7), logit_bias=None, mesh=mesh)
    return jax.value_and_grad(loss, has_aux=True)(embeddings)

  (value, (metrics, _)), gradients = run({"image": image, "text": text}, batch)
  parts = [float(metrics[f"loss_{name}"]) for name in PAIR_TERMS]
  assert np.isfinite(parts).all() and value == pytest.approx(0.5 * sum(parts), rel=1e-5)
  for gradient in gradients.values():
    assert np.isfinite(gradient).all() and np.abs(gradient).max(axis=1).min() > 0


IMAGE_AND_TEXT = {
  "hard": functools.partial(losses.hard_softmax_loss, top_k=4, logit_scale=9.0),
  "dcl": functools.partial(losses.decoupled_loss, sigma=0.5, intra_modal=True, logit_scale=9.0),
  "cwcl": functools.partial(losses.cwcl_loss, logit_scale=9.0),
  "mann_whitney": functools.partial(losses.mann_whitney_loss, logit_scale=9.0),
  "soft_clip": functools.partial(losses.soft_target_loss, logit_scale=9.0),
  "mv_infonce": lambda image, text, **options: losses.multi_view_softmax_loss(
    [image, text], logit_scale=9.0, **options
  ),
  "cacr": lambda *views, **options: losses.attraction_repulsion_loss(views, **options),
  "meow": lambda image, text, **options: losses.decoupled_loss(
    image, text, logit_scale=9.0, clusters=(jnp.arange(len(image)) % 100,), **options
  ),
  "margin": losses.margin_regularizer,
  "gram": lambda image, text, **options: losses.gram_loss([image, text, text[::-1]], logit_scale=9.0, **options),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.extra if name in ("meow", "margin") else ()) for name in IMAGE_AND_TEXT]
)
def test_temporary_memory_is_some_tiles_and_not_the_matrix(name):
  def size(pairs):
    rows = jax.ShapeDtypeStruct((pairs, 64), jnp.float32)
    function = jax.jit(jax.grad(lambda *sides: IMAGE_AND_TEXT[name](*sides, tile=128)[0], argnums=(0, 1)))
    return function.lower(rows, rows).compile().memory_analysis().temp_size_in_bytes

  small, large = size(2048), size(8192)
  # A block of two million comparisons is what Mann-Whitney holds.
  assert large - small < 6144 * (8 * 64 + 64) * 4
  assert large < 8192**2 * 4 / 2
