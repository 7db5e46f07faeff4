"""The term that compares the student's image embeddings with the teacher's."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.objectives.term import (
  TEACHER_IMAGE,
  Arrays,
  LocalTerm,
  Sizes,
  Variable,
  count_of_pairs,
  sum_of_pairs,
)
from contrastive_jax.parallel.placement import gathered

# FSDP splits the projection by the student's features.
_AXES = ("embed", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillFeatures(LocalTerm):
  """The mean distance of each image embedding from the teacher's, which `losses.feature_distances` computes.

  Attributes:
    distance: "cosine" or "mse".
    projection: whether a learned linear map takes the student's embeddings to the teacher's space. It is only needed
      to train and is no part of the model.
  """

  distance: str = "cosine"
  projection: bool = True

  leaves_out: ClassVar[bool] = True
  needs: ClassVar[frozenset[str]] = frozenset({TEACHER_IMAGE})

  def __post_init__(self):
    require_known("distance", self.distance, losses.DISTANCES)

  def params(self, sizes: Sizes) -> Arrays:
    student, teacher = sizes.embed_dim, sizes.teacher_dim
    if self.projection:
      return {"kernel": Variable((student, teacher), _AXES, _normal)}
    if student != teacher:
      raise UserError(
        "loss_options.distill_features.projection=False needs equal embedding sizes, the model has"
        f" {student} and its teacher {teacher}: set it to True"
      )
    return {}

  def total(self, model, outputs, batch, params):
    student = outputs["image"].embedding
    if self.projection:
      student = jnp.matmul(student, gathered(params["kernel"], _AXES), precision=jax.lax.Precision.HIGHEST)
    return sum_of_pairs(losses.feature_distances(student, batch.targets.image, self.distance), batch)

  def count(self, batch):
    return count_of_pairs(batch)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(key, shape) / jnp.sqrt(shape[0])
