"""Contrastive losses: embeddings in, a global loss and exact gradients out, on any mesh.

Each is a function `(image, text, *, logit_scale, ...) -> (loss, metrics)` on L2-normalised embeddings. It runs on one
device (`axis_name=None`) or on local shards inside `jax.shard_map`, where gradients are taken outside.
"""

from contrastive_jax.losses.alignment import squared_distances
from contrastive_jax.losses.sigmoid import sigmoid_loss
from contrastive_jax.losses.softmax import softmax_loss, weighted_softmax_loss

OBJECTIVES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}

__all__ = ["OBJECTIVES", "sigmoid_loss", "softmax_loss", "squared_distances", "weighted_softmax_loss"]
