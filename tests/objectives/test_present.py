"""Terms that sources are kept from: what is left out of a batch might as well not be in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax.models import dual_encoder
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.objectives import TERMS, Pairs, make_objective
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Segment
from data.extras import ExtrasOptions
from data.pipeline import Pipeline
from tests.data.toy import ToySource, WordTokenizer
from tests.keys import keys_of
from tests.objectives.stepping import batch_of, unit
from tests.training import accumulating

PAIRS = 16
GROUP = np.array([0, 1, 2, 3, 4, 1, 6, 7, 8, 9, 4, 4, 12, 13, 14, 15])
CASES = {
  "softmax": ("softmax", {"label_smoothing": 0.1, "tile": 3, "pair_weights": True}),
  "ring": ("softmax", {"strategy": "ring", "mean_negatives": True}),
  "sigmoid": ("sigmoid", {"tile": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_batch_without_them(case):
  name, options = CASES[case]
  term, rng = TERMS[name](**options), np.random.default_rng(0)
  image, text, weights = unit(rng, PAIRS), unit(rng, PAIRS), rng.uniform(0.5, 2, PAIRS)
  present = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0], bool)  # The last device has none.
  scale, bias = 6.0, -2.0

  def value(image, text, scale, bias, weights, keys, present, axes=None):
    pairs = Pairs(image, text, keys, scale, bias, weights=weights, present=present)
    loss, _, metrics = term(pairs, {}, {}, axis_name=axes, ring_order=None)
    return loss, metrics

  split, same = PartitionSpec(BATCH_AXES), PartitionSpec()
  mesh = MeshSpec(fsdp=2).make(jax.devices()[:4])
  island = jax.shard_map(
    lambda *arguments: value(*arguments, axes=BATCH_AXES),
    mesh=mesh,
    in_specs=(split, split, same, same, split, split, split),
    out_specs=same,
  )
  with jax.enable_x64(True):
    sides = [jnp.asarray(side) for side in (image, text, scale, bias)]
    found = jax.jit(jax.value_and_grad(island, argnums=range(4), has_aux=True))(
      *sides, weights, keys_of(GROUP), present
    )
    some = image[present], text[present], *sides[2:], weights[present], keys_of(GROUP[present]), None
    truth = jax.jit(jax.value_and_grad(value, argnums=range(4), has_aux=True))(*some)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-10), found[0], truth[0])
    for side in range(2):
      whole = np.zeros((PAIRS, image.shape[1]))
      whole[present] = truth[1][side]
      np.testing.assert_allclose(found[1][side], whole, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(found[1][2:], truth[1][2:], rtol=1e-9, atol=1e-14)


def test_local_terms_count_who_takes_part_and_a_batch_without_any_counts_nothing():
  rng, pairs = np.random.default_rng(1), 4
  objective = make_objective({"softmax": 1.0, "alignment": 2.0}, {})
  model = dual_encoder.merge(*dual_encoder.abstract(accumulating.make_spec().model))  # Which no one reads.
  image, text = unit(rng, pairs), unit(rng, pairs)
  outputs = {name: TowerOutputs(jnp.asarray(side), None, None) for name, side in (("image", image), ("text", text))}

  def loss(present):
    batch = dataclasses.replace(
      batch_of(np.arange(pairs), np.arange(pairs)), present_in={"alignment": np.array(present)}
    )
    return float(objective.local_loss(model, outputs, batch, objective.counts(batch))[0])

  distances = ((image - text) ** 2).sum(1)
  assert loss([True, False, True, False]) == pytest.approx(2 * (distances[0] + distances[2]) / 2, rel=1e-6)
  assert loss([False] * pairs) == 0


def test_a_batch_says_which_pairs_take_part():
  names = "toy", "other"
  segment = Segment(5, 8, tuple((name, 1) for name in names), 8)
  extras = ExtrasOptions(Extras(present_in={"softmax": ("toy",)}))
  options = {"text_length": 4, "patch_size": 4, "seed": 0, "threads": 0, "extras": extras}
  pipeline = Pipeline([segment], {name: ToySource(name, 20) for name in names}, WordTokenizer(), **options)
  batch = pipeline.batch(3)
  # Sources have id ranges of their own, in the order of the segment.
  np.testing.assert_array_equal(batch.present_in["softmax"], batch.ids < 20)
  assert 0 < batch.present_in["softmax"].sum() < 8
