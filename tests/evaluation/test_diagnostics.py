import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from contrastive_jax.evaluation import diagnostics
from contrastive_jax.evaluation.gradients import softmax_gradient


def unit(array: np.ndarray) -> np.ndarray:
  return array / np.linalg.norm(array, axis=-1, keepdims=True)


def problem(rng, *, images=23, texts=41, groups=9, dim=5):
  """Groups of unequal size on both sides, each with at least one image and one text."""
  image_group = np.concatenate([np.arange(groups), rng.integers(0, groups, images - groups)]) + (1 << 40)
  text_group = np.concatenate([np.arange(groups), rng.integers(0, groups, texts - groups)]) + (1 << 40)
  centre = rng.normal(size=(groups, dim))
  image = unit(centre[image_group - (1 << 40)] + rng.normal(size=(images, dim)))
  text = unit(centre[text_group - (1 << 40)] + 0.5 + rng.normal(size=(texts, dim)))
  return image, text, image_group, text_group


def square_distances(one, other):
  return np.sum((one[:, None] - other[None]) ** 2, axis=2)


@pytest.mark.parametrize("block", [4, 1024])
def test_spread_and_closeness_equal_the_plain_double_loop(block, rng):
  image, text, image_group, text_group = problem(rng)
  together = image_group[:, None] == text_group
  distance = square_distances(image, text)
  assert diagnostics.alignment(image, text, image_group, text_group) == pytest.approx(distance[together].mean())
  cross = diagnostics.cross_uniformity(image, text, image_group, text_group, block=block)
  assert cross == pytest.approx(np.log(np.mean(np.exp(-2 * distance[~together]))), rel=1e-12)
  upper = np.triu_indices(len(image), 1)
  for t in (2.0, 3.5):
    expected = np.log(np.mean(np.exp(-t * square_distances(image, image)[upper])))
    assert diagnostics.uniformity(image, t=t, block=block) == pytest.approx(expected, rel=1e-12)


def test_gap_terms_of_a_square_are_their_closed_forms():
  # Images at 0, 90, 180 and 270 degrees, each with a text 90 degrees further.
  image = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
  text = np.roll(image, -1, axis=0)
  group = np.arange(4)
  assert diagnostics.alignment(image, text, group, group) == pytest.approx(2.0)
  # Four of the six pairs are at right angles (squared distance 2), two are opposite (4).
  assert diagnostics.uniformity(image) == pytest.approx(np.log((4 * np.exp(-4) + 2 * np.exp(-8)) / 6))
  # Of three that do not match an image one is equal to it, one at a right angle, one opposite.
  assert diagnostics.cross_uniformity(image, text, group, group) == pytest.approx(
    np.log((1 + np.exp(-4) + np.exp(-8)) / 3)
  )
  assert diagnostics.modality_gap(image, text) == pytest.approx(0.0)
  assert diagnostics.modality_gap(image[:1], image[2:3]) == pytest.approx(2.0)


def test_collapse_is_uniformity_zero_and_tolerance_one_over_the_classes(rng):
  row = np.tile(unit(rng.normal(size=7)), (12, 1))
  assert diagnostics.uniformity(row) == pytest.approx(0.0, abs=1e-12)
  labels = np.repeat(np.arange(4), 3)
  assert diagnostics.tolerance(row, labels) == pytest.approx(1 / 4)
  scattered = unit(rng.normal(size=(12, 7)))
  same = labels[:, None] == labels
  assert diagnostics.tolerance(scattered, labels) == pytest.approx(np.mean((scattered @ scattered.T) * same))


def test_separability_is_that_of_scikit_learns_logistic_regression(rng):
  image, text = unit(rng.normal(size=(300, 6))), unit(rng.normal(size=(200, 6)) + 0.4)
  drawn = [rows[np.random.default_rng((0, n)).permutation(len(rows))[:200]] for n, rows in enumerate((image, text))]
  train = np.concatenate([rows[:160] for rows in drawn])
  model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(train, np.repeat([0, 1], 160))
  weights = diagnostics._logistic(train, np.repeat([-1.0, 1.0], 160))
  np.testing.assert_allclose(weights, [*model.coef_[0], *model.intercept_], atol=1e-6)
  expected = model.score(np.concatenate([rows[160:] for rows in drawn]), np.repeat([0, 1], 40))
  assert 0.6 < expected < 0.95
  assert diagnostics.modality_separability(image, text) == pytest.approx(expected)


def test_towers_that_never_meet_are_separable_and_equal_ones_are_not(rng):
  both = rng.normal(size=(2, 1000, 4))
  assert diagnostics.modality_separability(unit(both[0] + [9, 0, 0, 0]), unit(both[1] - [9, 0, 0, 0])) == 1.0
  assert diagnostics.modality_separability(unit(both[0]), unit(both[1])) == pytest.approx(0.5, abs=0.08)


def rank(rows):
  shares = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
  shares = shares[shares > 1e-12 * shares.sum()] / shares.sum()
  return np.exp(-np.sum(shares * np.log(shares)))


def test_the_rank_counts_directions_and_tells_a_collapse(rng):
  rows = unit(rng.normal(size=(50, 6)))
  assert diagnostics.effective_rank(rows) == pytest.approx(rank(rows)) and rank(rows) > 5
  plane = np.float32(rows[:, :2]) @ np.float32(rng.normal(size=(2, 6)))
  assert 1 < diagnostics.effective_rank(plane) < 2.0001
  assert diagnostics.effective_rank(np.tile(np.float32(rows[:1]), (50, 1))) == 0.0


def test_the_weights_of_the_gradient_are_those_of_a_softmax(rng):
  image, text = (unit(rng.normal(size=(12, 4))) for _ in range(2))

  def loss(logits):
    return -jnp.sum(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))

  with jax.enable_x64(True):
    slopes = np.asarray(jax.grad(loss)(jnp.asarray(9 * image @ text.T)))
  own, pushes = -np.diagonal(slopes), slopes[~np.eye(12, dtype=bool)].reshape(12, 11)
  np.testing.assert_allclose(own, pushes.sum(axis=1))
  shares = pushes / own[:, None]
  group = np.arange(12)
  means, found = softmax_gradient(image, text, group, group, logit_scale=9.0, block=5)
  assert means == pytest.approx(
    {
      "effective_negatives": np.mean(np.exp(-np.sum(shares * np.log(shares), axis=1))),
      "weight_of_hardest": np.mean(shares.max(axis=1)),
      "weight_of_positive": np.mean(own),
    }
  )
  assert softmax_gradient(image, text, group * 0, group * 0, logit_scale=9.0) == ({}, None)

  edges = np.append(found.similarities - 0.01, found.similarities[-1] + 0.01)
  similarities, other = np.float64(image) @ np.float64(text).T, ~np.eye(12, dtype=bool)
  for line, which, weights in (
    (found.push, other, slopes / own.sum()),
    (found.pull, ~other, -slopes / own.sum()),
    (found.negatives, other, np.full((12, 12), 1 / 132)),
  ):
    expected, _ = np.histogram(similarities[which], edges, weights=weights[which])
    np.testing.assert_allclose(line, expected, atol=1e-9)
    assert line.sum() == pytest.approx(1)


def test_captions_of_an_image_share_its_pull_by_their_probabilities():
  """An image with captions at similarities of 1 and 0, and another at 0.6, whose exponentials are e, 1 and e^0.6."""
  image, text = np.float32([[1, 0]]), np.float32([[1, 0], [0, 1], [0.6, 0.8]])
  _, found = softmax_gradient(image, text, np.array([0]), np.array([0, 0, 1]), logit_scale=1.0)
  assert found.pull[-1] == pytest.approx(np.e / (1 + np.e)) and found.pull[0] == pytest.approx(1 / (1 + np.e))
  assert found.push.max() == 1 and found.similarities[found.push.argmax()] == pytest.approx(0.6, abs=0.011)


def test_what_is_looked_at_in_training_is_exact_for_small_sets_and_near_it_for_a_sample(rng):
  image, text, image_group, text_group = problem(rng, images=400, texts=900, groups=300)
  everything = diagnostics.pair_diagnostics(image, text, image_group, text_group)
  assert everything == pytest.approx(
    {
      "alignment": diagnostics.alignment(image, text, image_group, text_group),
      "modality_gap": np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)),
      "uniformity_image": diagnostics.uniformity(image),
      "uniformity_text": diagnostics.uniformity(text),
      "uniformity_cross": diagnostics.cross_uniformity(image, text, image_group, text_group),
      **{f"rank_{side}": rank(rows) for side, rows in (("image", image), ("text", text))},
    }
  )
  some = diagnostics.pair_diagnostics(image, text, image_group, text_group, most=250)
  assert some == pytest.approx(everything, abs=0.06)
  alone = diagnostics.pair_diagnostics(image[:1], image[:1], image_group[:1], image_group[:1])
  assert alone == {"alignment": 0.0, "modality_gap": 0.0}
