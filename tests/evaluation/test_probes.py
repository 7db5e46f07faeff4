import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import probes


@pytest.fixture(scope="module")
def digits():
  """Unit rows of pixels: training rows and classes, test rows and classes, by other writers."""
  data = load_digits()
  rows = (data.data / np.linalg.norm(data.data, axis=1, keepdims=True)).astype(np.float32)
  return rows[:1437], data.target[:1437], rows[1437:], data.target[1437:]


def plain_adamw(features, labels, first, order, learning_rate, weight_decay):
  """The update rule written out, in float64."""
  parameters = {name: np.asarray(leaf, np.float64).copy() for name, leaf in first.items()}
  moment = {name: (np.zeros_like(leaf), np.zeros_like(leaf)) for name, leaf in parameters.items()}
  for step, rows in enumerate(order):
    rows = rows[rows >= 0]
    logits = features[rows] @ parameters["weight"] + parameters["bias"]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wrong = (probability - np.eye(logits.shape[1])[labels[rows]]) / len(rows)
    rate = learning_rate * (1 + np.cos(np.pi * step / len(order))) / 2
    for name, gradient in (("weight", features[rows].T @ wrong), ("bias", wrong.sum(axis=0))):
      mean, square = moment[name]
      mean += 0.1 * (gradient - mean)
      square += 0.001 * (gradient**2 - square)
      parameters[name] *= 1 - rate * weight_decay
      bias = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
      parameters[name] -= rate * (mean / bias[0]) / (np.sqrt(square / bias[1]) + 1e-8)
  return parameters


def test_training_is_adamw_with_a_cosine_step_by_step(rng):
  with jax.enable_x64(True):
    features, labels = rng.normal(size=(45, 5)), rng.integers(0, 3, 45)
    order = probes.batches(45, epochs=3, batch_size=16, seed=4)
    assert order.shape == (9, 16) and np.sum(order == -1) == 9
    for epoch in np.split(order, 3):
      np.testing.assert_array_equal(np.sort(epoch[epoch >= 0]), np.arange(45))
    first = probes.initial_weights(5, 3, seed=1)
    found = probes.fit_linear(features, labels, first, order, 0.1, 0.03)
    expected = plain_adamw(features, labels, first, order, 0.1, 0.03)
    for name in ("weight", "bias"):
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-9)


def test_a_linear_probe_of_digits_is_as_good_as_logistic_regression(digits):
  train, train_labels, test, test_labels = digits[0][:600], digits[1][:600], *digits[2:]
  found = probes.linear_probe(train, train_labels, test, test_labels, classes=10, epochs=20)
  reference = LogisticRegression(tol=1e-3).fit(train, train_labels).score(test, test_labels)
  assert reference > 0.84
  assert found["lp_acc1"] == pytest.approx(reference, abs=0.03)
  assert found["lp_acc5"] > 0.97 and 0.84 < found["lp_mean_per_class_recall"] <= 1
  # Features count by their direction.
  other = probes.linear_probe(3 * train, train_labels, test / 7, test_labels, classes=10, epochs=20)
  assert other == pytest.approx(found, abs=0.005)


def test_the_weight_decay_is_the_best_of_those_tried(digits):
  train, train_labels, test, test_labels = digits
  halves = train[:300], train_labels[:300], test, test_labels
  options = {"classes": 10, "epochs": 2}
  chosen = probes.best_weight_decay(*halves, **options)
  accuracy = {
    wd: probes.linear_probe(*halves, weight_decay=wd, **options)["lp_acc1"] for wd in (chosen, 1e-6, 0.01, 1.0)
  }
  assert accuracy[chosen] == max(accuracy.values())


def test_neighbours_vote_as_in_scikit_learn(digits):
  train, train_labels, test, test_labels = digits
  found = probes.knn_probe(train, train_labels, test, test_labels, classes=10, block=500)
  voting = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine")
  probability = voting.fit(train, train_labels).predict_proba(test)
  best = np.argsort(-probability, axis=1, kind="stable")[:, :5]
  assert found["knn_acc1"] == pytest.approx(np.mean(best[:, 0] == test_labels), abs=1e-12)
  assert found["knn_acc5"] == pytest.approx(np.mean((best == test_labels[:, None]).any(axis=1)), abs=1e-12)
  assert 0.93 < found["knn_mean_per_class_recall"] < 1


def test_a_gallery_smaller_than_k_votes_as_a_whole():
  train, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
  found = probes.knn_probe(train, labels, train, labels, classes=2)
  assert found == {"knn_acc1": 1.0, "knn_mean_per_class_recall": 1.0}


def test_few_shot_draws_k_of_each_class_whatever_the_others(rng):
  labels = rng.permutation(np.repeat([2, 5, 7], [4, 9, 30]))
  chosen = probes.few_shot(labels, 4, seed=3)
  assert np.bincount(labels[chosen]).tolist() == [0, 0, 4, 0, 0, 4, 0, 4]
  assert len(set(chosen.tolist())) == 12
  np.testing.assert_array_equal(chosen, probes.few_shot(labels, 4, seed=3))
  assert not np.array_equal(chosen, probes.few_shot(labels, 4, seed=4))
  only = labels != 7
  np.testing.assert_array_equal(
    np.flatnonzero(only)[probes.few_shot(labels[only], 4, seed=3)], [row for row in chosen if only[row]]
  )
  with pytest.raises(UserError, match="5 samples of each class are asked for, class 2 has 4: ask for no more"):
    probes.few_shot(labels, 5)
