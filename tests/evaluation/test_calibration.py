import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from contrastive_jax.evaluation import calibration
from contrastive_jax.evaluation.zero_shot import predict
from tests.evaluation.test_diagnostics import problem, unit


@pytest.mark.parametrize("block", [5, 1024])
@pytest.mark.parametrize("rounded", [False, True])
def test_global_auc_is_that_of_scikit_learn(block, rounded, rng):
  image, text, image_group, text_group = problem(rng)
  if rounded:  # Many equal scores, within and between the two kinds.
    image, text = np.round(image), np.round(text)
  expected = roc_auc_score((image_group[:, None] == text_group).ravel(), (image @ text.T).ravel())
  found = calibration.global_auc(image, text, image_group, text_group, block=block)
  assert found == pytest.approx(expected, abs=1e-12)
  assert 0.55 < found < 0.95


def test_auc_needs_both_kinds():
  one = np.ones((2, 3))
  with pytest.raises(ValueError, match="got 4 and 0 of 2 images and 2 texts"):
    calibration.global_auc(one, one, np.zeros(2, int), np.zeros(2, int))


def test_calibration_error_is_the_definition(rng):
  confidence = rng.uniform(size=500)
  confidence[:3] = 0.2, 1.0, 0.0  # The edge of a bin, and the ends.
  correct = rng.uniform(size=500) < confidence**2
  expected = 0.0
  for k in range(10):
    inside = (confidence > k / 10) & (confidence <= (k + 1) / 10) | ((k == 0) & (confidence == 0))
    expected += inside.sum() / 500 * abs(correct[inside].mean() - confidence[inside].mean())
  assert calibration.expected_calibration_error(confidence, correct, bins=10) == pytest.approx(expected)
  calibrated = rng.uniform(size=200_000)
  drawn = rng.uniform(size=200_000) < calibrated
  assert calibration.expected_calibration_error(calibrated, drawn) < 0.01


def test_a_scale_that_is_too_large_is_overconfident(rng):
  weights = unit(rng.normal(size=(10, 8))).astype(np.float32)
  labels = rng.integers(0, 10, 400)
  image = unit(weights[labels] + 0.35 * rng.normal(size=(400, 8))).astype(np.float32)
  errors = []
  for scale in (6.0, 1000.0):
    best, probability = predict(image, weights, logit_scale=scale, k=1)
    errors.append(calibration.expected_calibration_error(probability[:, 0], best[:, 0] == labels))
  accuracy = np.mean(best[:, 0] == labels)
  assert errors[1] == pytest.approx(1 - accuracy, abs=0.02)
  assert errors[0] < errors[1]
