"""A tie is no hit, however the negatives come to a device: a collapsed model has an accuracy of 0 and not of 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_identical_embeddings_hit_nothing_on_8_devices(strategy):
  mesh = MeshSpec().make(jax.devices()[:8])

  def local(image, text, scale):
    options = {"axis_name": BATCH_AXES, "strategy": strategy}
    loss, metrics = losses.OBJECTIVES["softmax"](image, text, logit_scale=scale, **options)
    return loss, metrics["accuracy_image_to_text"], metrics["accuracy_text_to_image"]

  split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
  shared = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, split, everywhere), out_specs=everywhere))
  rng = np.random.default_rng(0)
  for _ in range(6):
    one = rng.normal(size=(1, 48))
    same = jnp.asarray(np.repeat(one / np.linalg.norm(one), 64, axis=0), jnp.float32)
    loss, *accuracies = shared(same, same, jnp.float32(rng.uniform(1, 100)))
    np.testing.assert_allclose(loss, np.log(64), rtol=1e-5)
    assert accuracies == [0, 0]
    # Pairs of two that share their embedding with one other pair each tie as well.
    twice = rng.normal(size=(32, 48))
    twice = np.repeat(twice / np.linalg.norm(twice, axis=1, keepdims=True), 2, axis=0)
    twice = jnp.asarray(rng.permutation(twice), jnp.float32)
    assert list(shared(twice, twice, jnp.float32(20.0))[1:]) == [0, 0]
