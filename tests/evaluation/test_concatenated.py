"""Several models as one: its similarities are the means of theirs."""

import numpy as np

from contrastive_jax.evaluation.concatenated import Concatenated


class Linear:
  """Embeds rows of numbers by a matrix of its own."""

  def __init__(self, seed, dim, logit_scale):
    self.matrix, self.logit_scale = np.random.default_rng(seed).normal(size=(3, dim)), logit_scale

  def encode_image(self, images, projected=True):
    rows = np.float32(np.stack(images) @ self.matrix)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if projected else rows

  def encode_text(self, texts):
    return self.encode_image([np.float64(text.split()) for text in texts])


def similarities(model, images, texts):
  return model.encode_image(list(images)) @ model.encode_text([" ".join(map(repr, row)) for row in texts.tolist()]).T


def test_similarities_are_means_and_those_of_copies_are_unchanged(rng):
  images, texts = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
  one, other = Linear(0, 6, 10.0), Linear(1, 2, 30.0)
  both = Concatenated([one, other])
  expected = (similarities(one, images, texts) + similarities(other, images, texts)) / 2
  np.testing.assert_allclose(similarities(both, images, texts), expected, atol=1e-6)
  copies = Concatenated([one] * 3)
  np.testing.assert_allclose(similarities(copies, images, texts), similarities(one, images, texts), atol=1e-6)
  assert both.logit_scale == 20 and both.encode_image(list(images)).dtype == np.float32
  unprojected = both.encode_image(list(images), projected=False)
  np.testing.assert_allclose(np.linalg.norm(unprojected, axis=1), 1, rtol=1e-6)
