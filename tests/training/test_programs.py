"""Programs: one compiled step for each shape of batch."""

import jax
import jax.numpy as jnp

from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.training.programs import Programs
from tests.keys import keys_of


def batch_of(rows):
  image = ImageBatch(jnp.ones((rows, 2, 3), jnp.uint8), jnp.zeros((rows, 2, 3), jnp.int16))
  return Batch(
    image, TextBatch(jnp.ones((rows, 2), jnp.int32), jnp.ones((rows, 2), bool)), jnp.asarray(keys_of(jnp.arange(rows)))
  )


def test_one_program_for_each_shape_compiled_before_it_is_needed():
  traced, said = [], []

  def step(state, batch):
    traced.append(batch.image.patches.shape)
    return state + jnp.sum(batch.image.patches, dtype=jnp.int32), {}

  with Programs(jax.jit(step), jnp.int32(0), say=said.append) as programs:
    programs.prepare([batch_of(2), batch_of(3)])
    state = jnp.int32(0)
    for rows in (2, 2, 3, 2, 3, 5):
      state, _ = programs(state, batch_of(rows))
    assert int(state) == 6 * (2 + 2 + 3 + 2 + 3 + 5)
    assert len(programs) == len(said) == len(traced) == 3
  assert "2 image rows of 2 tokens" in said[0]
