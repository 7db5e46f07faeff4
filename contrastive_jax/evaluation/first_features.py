"""Evaluation of the first features of embeddings alone, as a model with nested dimensions allows."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from contrastive_jax.evaluation.tasks import Encoder, Images


def cut(embeddings: Float[np.ndarray, "rows dim"], size: int) -> Float[np.ndarray, "rows size"]:
  """Returns the first features of embeddings, normalised anew; zero where they are zero.

  Args:
    embeddings: the embeddings.
    size: number of features that are kept.

  Examples:
    >>> cut(np.array([[0.0, 2.0, 9.0], [0.0, 0.0, 1.0]]), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
  """
  part = embeddings[:, :size]
  length = np.linalg.norm(part, axis=1, keepdims=True)
  return part / np.where(length > 0, length, 1)


class FirstFeatures:
  """An encoder whose embeddings are the first features of another's."""

  def __init__(self, model: Encoder, size: int):
    self._model, self._size = model, size

  @property
  def logit_scale(self) -> float:
    return self._model.logit_scale

  @property
  def mesh(self) -> Mesh | None:
    return getattr(self._model, "mesh", None)

  def encode_image(self, images: Images) -> np.ndarray:
    return cut(self._model.encode_image(images), self._size)

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    return cut(self._model.encode_text(texts), self._size)
