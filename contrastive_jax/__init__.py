"""Contrastive pretraining of image-text dual encoders with JAX: exact losses on any mesh, bit-exact resume."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from contrastive_jax.inference import Model
  from contrastive_jax.loading import load
  from contrastive_jax.pretrain import train

__all__ = ["Model", "load", "train"]
__version__ = "0.1.0"

# Public name -> its module, which is imported when the name is used: JAX and Flax take seconds.
_MODULES = {
  "Model": "contrastive_jax.inference",
  "load": "contrastive_jax.loading",
  "train": "contrastive_jax.pretrain",
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module 'contrastive_jax' has no attribute '{name}'")
  value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES})
