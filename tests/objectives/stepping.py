"""Takes steps of an objective on a mesh, with embeddings in place of towers."""

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.objectives import Sizes, make_objective
from contrastive_jax.objectives.objective import axes, create
from contrastive_jax.parallel.mesh import MeshSpec
from tests.keys import keys_of

PAIRS, DIM, SAMPLES = 16, 6, 40


def unit(rng, count=PAIRS):
  rows = rng.standard_normal((count, DIM))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def batch_of(group, rows):
  pairs = len(rows)
  image = ImageBatch(np.zeros((pairs, 1, 3), np.uint8), np.zeros((pairs, 1, 3), np.int16))
  text = TextBatch(np.zeros((pairs, 1), np.int32), np.ones((pairs, 1), bool))
  return Batch(image, text, keys_of(group), state_rows=rows.astype(np.int32))


def stepping(term, options, devices):
  """The mesh, the parameters and the state of a term, and a step that gives value, gradients and the state after it."""
  objective = make_objective({term: 1.0}, options)
  sizes = Sizes(DIM, samples=SAMPLES)
  mesh = MeshSpec(fsdp=min(2, devices)).make(jax.devices()[:devices])
  learned, variables = objective.params(sizes), objective.state(sizes)

  @jax.jit
  def run(embeddings, batch, state, params=None):
    def value(embeddings):
      return objective.global_loss(
        embeddings, batch, jnp.float32(7), None, mesh, params=params, state=state, state_axes=axes(variables)
      )

    return jax.value_and_grad(value, has_aux=True)(dict(zip(("image", "text"), embeddings, strict=True)))

  key = jax.random.key(0)
  return mesh, create(learned, key), create(variables, key), run
