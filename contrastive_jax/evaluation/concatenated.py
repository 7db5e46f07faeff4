"""Evaluation of several models as one, whose embeddings are theirs one after the other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from contrastive_jax.evaluation.tasks import Encoder, Images


class Concatenated:
  """An encoder whose embeddings are those of several models, concatenated and normalised.

  The similarity of an image and a text is the mean of those that the models give, and so is the logit scale. MCL
  (arXiv 2402.11816) joins the models of its stages so, by features whose lengths weigh them; here all weigh the same.
  """

  def __init__(self, models: Sequence[Encoder]):
    self._models = models

  @property
  def logit_scale(self) -> float:
    return float(np.mean([model.logit_scale for model in self._models]))

  @property
  def mesh(self) -> Mesh | None:
    return getattr(self._models[0], "mesh", None)

  def encode_image(self, images: Images, **how: Any) -> np.ndarray:
    return self._joined([model.encode_image(images, **how) for model in self._models])

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    return self._joined([model.encode_text(texts) for model in self._models])

  def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
    # Each has a length of 1, but for features before the projection.
    joined = np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], axis=1)
    return joined / np.float32(np.sqrt(len(parts)))
