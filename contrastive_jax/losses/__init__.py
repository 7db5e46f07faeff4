"""Contrastive losses: embeddings in, a global loss and exact gradients out, on any mesh.

Each is a function `(image, text, *, logit_scale, ...) -> (loss, metrics)` on L2-normalised embeddings. It runs on one
device (`axis_name=None`) or on local shards inside `jax.shard_map`, where gradients are taken outside. Those that
distil also take a frozen teacher's embeddings of the same pairs, and those of several views a sequence of embeddings.
"""

from contrastive_jax.losses.alignment import squared_distances
from contrastive_jax.losses.cacr import attraction_repulsion_loss, reweighted_softmax_loss
from contrastive_jax.losses.clusters import cluster_proxy_loss, spherical_k_means
from contrastive_jax.losses.cross_correlation import cross_correlation_loss
from contrastive_jax.losses.cwcl import cwcl_loss
from contrastive_jax.losses.decoupled import decoupled_loss
from contrastive_jax.losses.distillation import (
  DISTANCES,
  feature_distances,
  positive_distillation,
  relational_distillation,
  similarity_distillation,
)
from contrastive_jax.losses.gated import gated_pairs_loss
from contrastive_jax.losses.gram import gram_loss
from contrastive_jax.losses.hard_negatives import hard_softmax_loss
from contrastive_jax.losses.individual_temperatures import individual_temperature_loss
from contrastive_jax.losses.mann_whitney import mann_whitney_loss
from contrastive_jax.losses.margin import margin_regularizer
from contrastive_jax.losses.mixup import mixup_loss
from contrastive_jax.losses.mochi import mixed_negatives_loss
from contrastive_jax.losses.multi_view import decoupled_views_loss, multi_view_softmax_loss
from contrastive_jax.losses.prototypes import balancing_scales, swapped_prototypes_loss
from contrastive_jax.losses.queue import queued_softmax_loss
from contrastive_jax.losses.sigmoid import balanced_bias, sigmoid_loss
from contrastive_jax.losses.soft_targets import soft_target_loss
from contrastive_jax.losses.softmax import softmax_loss, weighted_softmax_loss
from contrastive_jax.losses.sorting import sorting_loss
from contrastive_jax.losses.spread import cross_uniformity, uniformity

OBJECTIVES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}
DISTILLATIONS = {"distill_similarity": similarity_distillation, "distill_relational": relational_distillation}

__all__ = [
  "DISTANCES",
  "DISTILLATIONS",
  "OBJECTIVES",
  "attraction_repulsion_loss",
  "balanced_bias",
  "balancing_scales",
  "cluster_proxy_loss",
  "cross_correlation_loss",
  "cross_uniformity",
  "cwcl_loss",
  "decoupled_loss",
  "decoupled_views_loss",
  "feature_distances",
  "gated_pairs_loss",
  "gram_loss",
  "hard_softmax_loss",
  "individual_temperature_loss",
  "mann_whitney_loss",
  "margin_regularizer",
  "mixed_negatives_loss",
  "mixup_loss",
  "multi_view_softmax_loss",
  "positive_distillation",
  "queued_softmax_loss",
  "relational_distillation",
  "reweighted_softmax_loss",
  "sigmoid_loss",
  "similarity_distillation",
  "soft_target_loss",
  "softmax_loss",
  "sorting_loss",
  "spherical_k_means",
  "squared_distances",
  "swapped_prototypes_loss",
  "uniformity",
  "weighted_softmax_loss",
]
