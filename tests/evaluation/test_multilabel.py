import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from contrastive_jax.evaluation.multilabel import average_precision, evaluate_multilabel
from contrastive_jax.evaluation.tasks import MultiLabelSet


def test_average_precision_is_that_of_scikit_learn(rng):
  scores, labels = rng.normal(size=(80, 6)), rng.uniform(size=(80, 6)) < 0.2
  expected = [average_precision_score(labels[:, k], scores[:, k]) for k in range(6)]
  np.testing.assert_allclose(average_precision(scores, labels), expected, rtol=1e-12)


def test_a_class_that_no_image_shows_counts_zero_and_equal_scores_rank_by_index():
  scores = np.array([[0.5, 0.1], [0.5, 0.2], [0.5, 0.3]])
  labels = np.array([[False, False], [True, False], [True, False]])
  # Positives are second and third: precisions 1/2 and 2/3.
  np.testing.assert_allclose(average_precision(scores, labels), [(1 / 2 + 2 / 3) / 2, 0.0])


class Corners:
  """An image's first pixel, and the last number of a prompt, choose rows of two tables."""

  logit_scale = 10.0

  def __init__(self, image, text):
    self.image, self.text = image, text

  def encode_image(self, images):
    return np.stack([self.image[images[i][0, 0, 0]] for i in range(len(images))])

  def encode_text(self, texts):
    return np.stack([self.text[int(text.split()[-1])] for text in texts])


def test_a_set_is_scored_by_the_cosine_of_images_and_class_prompts(rng):
  image, text = (rng.normal(size=(n, 6)) for n in (30, 4))
  image, text = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))
  labels = image @ text.T + 0.4 * rng.normal(size=(30, 4)) > 0.2
  scored = MultiLabelSet(
    name="toy",
    images=[np.full((2, 2, 3), k, np.uint8) for k in range(30)],
    labels=labels,
    classes=[str(k) for k in range(4)],
    templates=["a {}", "the {}"],
  )
  result = evaluate_multilabel(Corners(image, text), scored)
  cosine = image.astype(np.float64) @ text.astype(np.float64).T
  expected = np.mean([average_precision_score(labels[:, k], cosine[:, k]) for k in range(4)])
  assert 0.4 < expected < 1
  assert result.metrics == {"mean_average_precision": pytest.approx(expected)}
  assert (result.task, result.sizes) == ("zeroshot_classification", {"images": 30, "classes": 4})
