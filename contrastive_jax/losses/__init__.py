"""Contrastive losses: embeddings in, a global loss and exact gradients out, on any mesh.

Each is a function `(image, text, *, logit_scale, ...) -> (loss, metrics)` on L2-normalised embeddings. It runs on one
device (`axis_name=None`) or on local shards inside `jax.shard_map`, where gradients are taken outside. Those that
distil also take a frozen teacher's embeddings of the same pairs.
"""

from contrastive_jax.losses.alignment import squared_distances
from contrastive_jax.losses.cross_correlation import cross_correlation_loss
from contrastive_jax.losses.distillation import (
  DISTANCES,
  feature_distances,
  relational_distillation,
  similarity_distillation,
)
from contrastive_jax.losses.individual_temperatures import individual_temperature_loss
from contrastive_jax.losses.prototypes import sinkhorn, swapped_prototypes_loss
from contrastive_jax.losses.queue import queued_softmax_loss
from contrastive_jax.losses.sigmoid import balanced_bias, sigmoid_loss
from contrastive_jax.losses.softmax import softmax_loss, weighted_softmax_loss
from contrastive_jax.losses.spread import cross_uniformity, uniformity

OBJECTIVES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}
DISTILLATIONS = {"distill_similarity": similarity_distillation, "distill_relational": relational_distillation}

__all__ = [
  "DISTANCES",
  "DISTILLATIONS",
  "OBJECTIVES",
  "balanced_bias",
  "cross_correlation_loss",
  "cross_uniformity",
  "feature_distances",
  "individual_temperature_loss",
  "queued_softmax_loss",
  "relational_distillation",
  "sigmoid_loss",
  "similarity_distillation",
  "sinkhorn",
  "softmax_loss",
  "squared_distances",
  "swapped_prototypes_loss",
  "uniformity",
  "weighted_softmax_loss",
]
