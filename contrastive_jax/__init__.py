"""Contrastive pretraining of image-text dual encoders with JAX: exact losses on any mesh, bit-exact resume."""

from contrastive_jax.inference import Model
from contrastive_jax.loading import load

__all__ = ["Model", "load"]
