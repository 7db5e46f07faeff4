import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score

from contrastive_jax.evaluation.tasks import LabelledSet
from contrastive_jax.evaluation.zero_shot import (
  accuracy_of_draws,
  balanced_accuracy,
  classifier,
  evaluate_zero_shot,
  predict,
)


def unit(array: np.ndarray) -> np.ndarray:
  return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


class TableEncoder:
  """Embeds text by looking it up and an image by its first pixel: no model, all answers known."""

  logit_scale = 20.0

  def __init__(self, image: np.ndarray, text: dict[str, np.ndarray]):
    self.image, self.text = image, text

  def encode_image(self, images):
    return np.stack([self.image[int(images[i][0, 0, 0]) * 256 + int(images[i][0, 0, 1])] for i in range(len(images))])

  def encode_text(self, texts):
    return np.stack([self.text[text] for text in texts])


def picture(index: int) -> np.ndarray:
  image = np.zeros((4, 5, 3), np.uint8)
  image[0, 0, :2] = divmod(index, 256)
  return image


def problem(rng, *, images=600, classes=12, dim=8, templates=("a {}", "the {}"), noise=1.2, **fields):
  names = [f"class {i}" for i in range(classes)]
  text = {t.replace("{}", n): unit(rng.normal(size=dim)) for n in names for t in templates}
  # Unequal class sizes, so that balanced accuracy is not accuracy; the last class has no image.
  labels = rng.choice(classes - 1, size=images, p=np.arange(1, classes) / np.arange(1, classes).sum())
  centres = np.stack([unit(sum(text[t.replace("{}", n)] for t in templates)) for n in names])
  image = unit(centres[labels] + noise * rng.normal(size=(images, dim)) / np.sqrt(dim))
  model = TableEncoder(image, text)
  labelled = LabelledSet("toy/set", [picture(i) for i in range(images)], labels, names, templates, **fields)
  return model, labelled


def test_classifier_is_the_normalised_mean_of_normalised_prompts(rng, monkeypatch):
  model, labelled = problem(rng)
  expected = [
    unit(np.mean([model.text[f"{word} {name}"] for word in ("a", "the")], axis=0)) for name in labelled.classes
  ]
  np.testing.assert_allclose(classifier(model, labelled.classes, labelled.templates), expected, rtol=1e-6)
  # Classes embedded a few at a time.
  monkeypatch.setattr("contrastive_jax.evaluation.zero_shot.PROMPTS_AT_ONCE", 5)
  np.testing.assert_allclose(classifier(model, labelled.classes, labelled.templates), expected, rtol=1e-6)


def test_a_class_name_with_braces_is_text():
  seen = []

  class Recorder(TableEncoder):
    def encode_text(self, texts):
      seen.extend(texts)
      return np.ones((len(texts), 2), np.float32)

  classifier(Recorder(np.zeros((0, 2)), {}), ["a {} {0} b"], ["<{}>"])
  assert seen == ["<a {} {0} b>"]


@pytest.mark.parametrize("block", [7, 600, 1024])
def test_predictions_equal_a_float64_softmax_for_any_block(block, rng):
  model, labelled = problem(rng)
  weights = classifier(model, labelled.classes, labelled.templates)
  best, probability = predict(model.image, weights, logit_scale=model.logit_scale, k=5, block=block)
  logits = 20.0 * model.image.astype(np.float64) @ weights.T.astype(np.float64)
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
  np.testing.assert_array_equal(best, order)
  np.testing.assert_allclose(probability, np.take_along_axis(expected, order, axis=1), rtol=1e-4)


def test_equal_scores_rank_by_index():
  weights = np.eye(4, dtype=np.float32)[[0, 1, 1, 1]]
  best, probability = predict(weights[2:3], weights, logit_scale=1.0, k=3)
  np.testing.assert_array_equal(best, [[1, 2, 3]])
  np.testing.assert_allclose(probability, np.e / (3 * np.e + 1), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_metrics_equal_the_plain_answers(rng):
  model, labelled = problem(rng)
  result = evaluate_zero_shot(model, labelled)
  weights = classifier(model, labelled.classes, labelled.templates).astype(np.float64)
  order = np.argsort(-model.image.astype(np.float64) @ weights.T, axis=1, kind="stable")
  hit = order == labelled.labels[:, None]
  sure = softmax(model.logit_scale * model.image.astype(np.float64) @ weights.T, axis=1).max(axis=1)
  bins = np.ceil(15 * sure)
  gaps = [abs(np.sum(hit[bins == k, 0] - sure[bins == k])) for k in range(1, 16)]
  assert result.metrics == pytest.approx(
    {
      "acc1": hit[:, 0].mean(),
      "acc5": hit[:, :5].any(axis=1).mean(),
      "mean_per_class_recall": balanced_accuracy_score(labelled.labels, order[:, 0]),
      "expected_calibration_error": sum(gaps) / len(hit),
    }
  )
  assert result.metrics["acc1"] != pytest.approx(result.metrics["mean_per_class_recall"], abs=1e-3)
  assert (result.dataset, result.task, result.sizes) == (
    "toy/set",
    "zeroshot_classification",
    {"images": 600, "classes": 12},
  )


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_ignores_classes_without_images(rng):
  labels, predicted = rng.choice([1, 4, 5], 50), rng.integers(0, 9, 50)
  assert balanced_accuracy(predicted, labels) == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_no_top_five_under_five_classes(rng):
  model, labelled = problem(rng, classes=4, images=60)
  result = evaluate_zero_shot(model, labelled)
  assert sorted(result.metrics) == ["acc1", "expected_calibration_error", "mean_per_class_recall"]
  assert all(len(guess.predictions) == 4 for guess in result.guesses)


def test_accuracy_of_draws(rng):
  model, labelled = problem(rng, images=300, classes=30)
  weights = classifier(model, labelled.classes, labelled.templates)
  found = accuracy_of_draws(model.image, weights, labelled.labels, classes_per_draw=10, draws=6, seed=3)
  expected = []
  for draw in range(6):
    present = sorted(set(labelled.labels.tolist()))
    drawn = sorted(np.random.default_rng((3, draw)).choice(present, 10, replace=False).tolist())
    right = [
      max(drawn, key=lambda c, e=embedding: e @ weights[c]) == label
      for embedding, label in zip(model.image, labelled.labels, strict=True)
      if label in drawn
    ]
    expected.append(np.mean(right))
  np.testing.assert_allclose(found, expected)
  # Fewer draws are the first of more, and all classes in one draw is plain accuracy.
  kept = accuracy_of_draws(model.image, weights, labelled.labels, classes_per_draw=10, draws=2, seed=3)
  np.testing.assert_array_equal(kept, found[:2])
  every, position = np.unique(labelled.labels, return_inverse=True)
  best, _ = predict(model.image, weights[every], logit_scale=1.0, k=1)
  everything = accuracy_of_draws(model.image, weights, labelled.labels, classes_per_draw=len(every), draws=1)
  assert everything[0] == pytest.approx(np.mean(best[:, 0] == position))
  with pytest.raises(ValueError, match="classes_per_draw=100"):
    accuracy_of_draws(model.image, weights, labelled.labels)


def test_the_drawn_accuracy_is_reported_where_classes_are_many(rng):
  model, labelled = problem(rng, images=500, classes=30)
  result = evaluate_zero_shot(model, labelled, classes_per_draw=10, draws=4, seed=1)
  weights = classifier(model, labelled.classes, labelled.templates)
  expected = accuracy_of_draws(model.image, weights, labelled.labels, classes_per_draw=10, draws=4, seed=1).mean()
  assert result.metrics["acc1_of_10"] == pytest.approx(expected)
  assert not any("_of_" in name for name in evaluate_zero_shot(model, labelled, classes_per_draw=0).metrics)


def test_examples_tell_what_happened(rng):
  groups = np.arange(600) // 3
  model, labelled = problem(rng, groups=groups)
  result = evaluate_zero_shot(model, labelled, examples=10, seed=5)
  assert sum(guess.correct for guess in result.guesses) == 5 == len(result.guesses) // 2
  shown = [int(guess.image[0, 0, 0]) * 256 + int(guess.image[0, 0, 1]) for guess in result.guesses]
  assert len(set(groups[shown])) == 10
  for index, guess in zip(shown, result.guesses, strict=True):
    assert guess.truth == labelled.classes[labelled.labels[index]]
    assert guess.correct == (guess.predictions[0][0] == guess.truth)
    chances = [p for _, p in guess.predictions]
    assert chances == sorted(chances, reverse=True) and sum(chances) <= 1 + 1e-5
  again = evaluate_zero_shot(model, labelled, examples=10, seed=5)
  assert [guess.truth for guess in again.guesses] == [guess.truth for guess in result.guesses]
  assert [guess.predictions for guess in again.guesses] == [guess.predictions for guess in result.guesses]


@pytest.mark.parametrize(("noise", "right"), [(0.0, 10), (1e-6, 10)])
def test_examples_are_all_right_when_nothing_is_wrong(noise, right, rng):
  model, labelled = problem(rng, noise=noise)
  result = evaluate_zero_shot(model, labelled, examples=10)
  assert sum(guess.correct for guess in result.guesses) == right
  assert result.confusions == ()


def test_confusions_are_the_most_frequent_mistakes(rng):
  model, labelled = problem(rng)
  result = evaluate_zero_shot(model, labelled, confusions=6)
  weights = classifier(model, labelled.classes, labelled.templates)
  predicted = (model.image @ weights.T).argmax(axis=1)
  wrong = predicted != labelled.labels
  pairs, counts = np.unique(np.stack([labelled.labels, predicted], 1)[wrong], axis=0, return_counts=True)
  table = {(labelled.classes[a], labelled.classes[b]): n for (a, b), n in zip(pairs, counts, strict=True)}
  assert [c.count for c in result.confusions] == sorted(table.values(), reverse=True)[:6]
  for confusion in result.confusions:
    assert table[confusion.truth, confusion.predicted] == confusion.count
    index = int(confusion.image[0, 0, 0]) * 256 + int(confusion.image[0, 0, 1])
    assert labelled.classes[labelled.labels[index]] == confusion.truth
    assert labelled.classes[predicted[index]] == confusion.predicted
    # The class without images is shown without one.
    assert (confusion.predicted_image is None) == (confusion.predicted == "class 11")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"labels": np.zeros(2, int)}, "one integer label for each of 3"),
    ({"labels": np.zeros(3)}, "labels is float64.*not integers"),
    ({"labels": np.array([0, 1, 2])}, "labels run from 0 to 2, there are 2"),
    ({"templates": "a {}"}, "templates takes a list"),
    ({"templates": ["a photo"]}, "exactly once"),
    ({"groups": np.zeros(4, int)}, "groups holds one integer"),
  ],
)
def test_a_wrong_set_is_refused(change, message):
  fields = dict(images=[picture(0)] * 3, labels=np.array([0, 1, 0]), classes=["a", "b"], templates=["{}"])
  with pytest.raises(ValueError, match=message):
    LabelledSet("toy", **(fields | change))
