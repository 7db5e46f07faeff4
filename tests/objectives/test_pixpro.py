"""The dense term of two views: which patches show the same place, and its value against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from contrastive_jax.batch import Batch, ImageBatch, StrongViews, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.outputs import STRONG_IMAGE
from contrastive_jax.objectives import TERMS, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.objectives.pixpro import same_place
from contrastive_jax.training.run import Run
from data.augment import STRONG
from tests.keys import keys_of
from tests.training import accumulating

PIXELS = 4


def views_of(places, side, patches=None):
  """A batch of squares of `side` patches, of which some have two views at `places`."""
  pairs, length = len(places), side**2
  place = np.arange(length)
  coords = np.tile(np.stack([0 * place, place // side, place % side], axis=1).astype(np.int16), (pairs, 1, 1))
  image = ImageBatch(np.zeros((pairs, length, 3 * PIXELS**2), np.uint8), coords)
  text = TextBatch(np.zeros((pairs, 1), np.int32), np.ones((pairs, 1), bool))
  return Batch(image, text, keys_of(np.arange(pairs)), strong=StrongViews(patches, places=np.float32(places)))


def test_equal_views_match_patch_by_patch_and_distant_ones_nowhere():
  whole, far = [[1, 0, 0], [0, 1, 0]], [[1, 0, 100], [0, 1, 0]]
  found = same_place(views_of([[whole, whole], [whole, far]], 7), PIXELS, 0.7)
  np.testing.assert_array_equal(found[0], np.eye(49, dtype=bool))
  assert not found[1].any()
  # A view of half the size, mirrored: its left column lies on the right side of the other one's left half.
  mirrored = same_place(views_of([[whole, [[-0.5, 0, 7.5], [0, 0.5, 0]]]], 4), PIXELS, 0.3)[0]
  rows, columns = np.nonzero(np.asarray(mirrored).reshape(4, 4, 4, 4).any(axis=(0, 2)))
  assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(0, 2), (0, 3), (1, 0), (1, 1)}


def test_places_say_which_pixel_of_the_image_a_view_shows():
  """The colours of the image are the coordinates of its pixels; views without changes of colour show them."""
  size, count = 24, 40
  down, across = np.mgrid[:60, :80]
  image = np.stack([3 * across, 4 * down, 0 * down], axis=-1).astype(np.uint8)
  augment = dataclasses.replace(STRONG, colour=0.0, grey=0.0, blur=0.0)
  draws = np.random.default_rng(0).random((count, 28))
  images, flips = [image] * count, [True] * count
  views, places = augment(images, flips, size, draws), augment.places(images, flips, size, draws)
  y, x = np.mgrid[:size, :size]
  shown = np.einsum("vab,bij->vija", places[..., :2], np.stack([x, y])) + places[:, None, None, :, 2]
  for colour, factor in enumerate((3, 4)):
    error = views[..., colour] / factor - shown[..., colour]
    inside = error[:, 2:-2, 2:-2]  # Bilinear sampling repeats the border.
    assert np.abs(inside).max() < 1.5 and np.abs(inside).mean() < 0.5


def reference(states, slow_states, params, slow_params, places):
  """The loss of one image by loops over its patches."""

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def projected(x, layers):
    x = x @ layers["layer1"]["kernel"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = np.maximum(x * layers["layer1"]["scale"] + layers["layer1"]["bias"], 0)
    return x @ layers["layer2"]["kernel"] + layers["layer2"]["bias"]

  def smoothed(x, layer):
    values, likeness = unit(x @ layer["kernel"] + layer["bias"]), unit(x)
    return unit(
      np.array([sum(max(p @ q, 0) ** 2 * v for q, v in zip(likeness, values, strict=True)) for p in likeness])
    )

  side = int(len(states[0]) ** 0.5)
  middles = [np.array([PIXELS * (k % side) + 1.5, PIXELS * (k // side) + 1.5]) for k in range(side**2)]
  seen = [[place[:, :2] @ middle + place[:, 2] for middle in middles] for place in places]
  diagonal = max(PIXELS * np.hypot(np.linalg.norm(place[:, 0]), np.linalg.norm(place[:, 1])) for place in places)
  targets = [unit(projected(x, slow_params["projector"])) for x in slow_states]
  predicted = [smoothed(projected(x, params["projector"]), params["propagation"]["layer1"]) for x in states]
  loss = 0.0
  for one, other in ((0, 1), (1, 0)):
    cosines = [
      predicted[one][p] @ targets[other][q]
      for p in range(side**2)
      for q in range(side**2)
      if np.linalg.norm(seen[one][p] - seen[other][q]) < 0.7 * diagonal
    ]
    loss -= 2 * np.mean(cosines) if cosines else 0
  return loss


def test_it_is_numpys_value_and_counts_the_images_that_take_part():
  pairs, rng = 3, np.random.default_rng(1)
  spec = accumulating.make_spec()
  shift = [[1, 0, 3.0], [0, 1, -2.0]]
  places = np.array([[np.eye(2, 3), shift], [np.eye(2, 3), np.eye(2, 3)], [shift, [[0.5, 0, 50], [0, 0.5, 0]]]])
  batch = views_of(places, 2, rng.integers(0, 256, (pairs, 2, 4, 48), np.uint8))
  term = TERMS["pixpro"](hidden=6)
  graphdef, shapes = dual_encoder.abstract(spec.model)
  towers, slow_towers = (
    jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.standard_normal(leaf.shape)), shapes) for _ in range(2)
  )
  params, slow_params = (
    create({"": term.params(Sizes(16, model=spec.model))}, jax.random.key(seed))[""] for seed in range(2)
  )

  @jax.jit
  def values(towers, slow_towers, params, slow_params, batch):
    model, slow = (dual_encoder.merge(graphdef, each) for each in (towers, slow_towers))
    outputs = {STRONG_IMAGE: model.image_views(batch.image, batch.strong.patches, pairs)}
    slow_states = slow.image_views(batch.image, batch.strong.patches, pairs).states
    some = dataclasses.replace(batch, present=jnp.array([True, True, False]))
    found = [
      term.total(model, outputs, part, params, average=(slow, slow_params)) / term.count(part) for part in (batch, some)
    ]
    return found, outputs[STRONG_IMAGE].states, slow_states

  (whole, first), states, slow_states = values(towers, slow_towers, params, slow_params, batch)
  numbers = [jax.tree.map(np.float64, arrays) for arrays in (params, slow_params)]
  states, slow_states = (np.float64(each).reshape(pairs, 2, 4, -1) for each in (states, slow_states))
  expected = [reference(states[k], slow_states[k], *numbers, places[k]) for k in range(pairs)]
  assert expected[2] == 0 and all(abs(each) > 1e-2 for each in expected[:2])
  assert float(whole) == pytest.approx(np.mean(expected), rel=1e-4)
  assert float(first) == pytest.approx(np.mean(expected[:2]), rel=1e-4)


def test_it_needs_a_moving_average():
  config = common.get_config()
  config.data.sources = {"noto": 1.0}
  config.objective = {"sigmoid": 1.0, "pixpro": 0.1}
  with pytest.raises(UserError, match=r"average_decay=0\.0 keeps no moving average .* or leave the term out"):
    Run.from_config(config)
  config.average_decay = 0.999
  assert Run.from_config(config).objective.strong_images == 2


@pytest.mark.slow
@pytest.mark.extra
def test_accumulated_gradients_equal_those_of_the_batch_in_one_piece():
  objective = make_objective({"softmax": 1.0, "pixpro": 0.5}, {"pixpro": {"hidden": 8}})
  rng, pairs = np.random.default_rng(2), accumulating.PAIRS
  places = np.eye(2, 3) + rng.normal(0, 0.5, (pairs, 2, 2, 3)) * [1, 1, 4]
  strong = StrongViews(rng.integers(0, 256, (pairs, 2, 4, 48), np.uint8), places=np.float32(places))
  batch = dataclasses.replace(accumulating.make_batch(rng), strong=strong)

  def differentiated(devices, accumulate):
    spec = dataclasses.replace(accumulating.make_spec(devices), objective=objective)
    learned = create(objective.params(Sizes(16, model=spec.model)), jax.random.key(2))
    return accumulating.differentiate(spec, batch, accumulate, learned, with_average=True)

  accumulating.assert_equal(differentiated(4, 2), differentiated(1, 1), tolerance=1e-5)
