"""Resizing the weights of an image tower to another patch size, another grid or to clips, so that little changes."""

import functools

import jax
import numpy as np
from jaxtyping import Float

from contrastive_jax.models.config import ImageConfig


@functools.lru_cache(maxsize=8)
def _resize_matrix(old: int, new: int) -> np.ndarray:
  """Returns the matrix `[new^2, old^2]` that resizes a square picture by bilinear interpolation, antialiased."""
  basis = np.eye(old * old, dtype=np.float64).reshape(old * old, old, old)
  with jax.enable_x64(True):
    resized = jax.image.resize(basis, (old * old, new, new), "bilinear")
  return np.asarray(resized, np.float64).reshape(old * old, new * new).T


def patch_kernel(
  kernel: Float[np.ndarray, "pixels width"], old: ImageConfig, new: ImageConfig
) -> Float[np.ndarray, "other_pixels width"]:
  """Resizes a patch embedding for patches of another size, for clips instead of images, or the other way round.

  Args:
    kernel: the patch embedding, with rows in the order (frame, y, x, channel).
    old: the tower that the kernel comes from.
    new: the tower that the kernel is made for.

  Returns:
    The kernel whose products with resized patches are nearest to those of `kernel` with the patches themselves. They
    are equal where patches grow: FlexiViT's pseudo-inverse resize (arXiv 2212.08013, equation 3). Frames are spread
    evenly, so that an image keeps its embedding.
  """
  frames, side, channels = old.tubelet, old.patch_size, old.channels
  spatial = np.asarray(kernel, np.float64).reshape(frames, side * side, channels, -1)
  if new.patch_size != side:
    inverse = np.linalg.pinv(_resize_matrix(side, new.patch_size)).T
    spatial = np.einsum("np,fpcw->fncw", inverse, spatial)
  if new.tubelet != frames:
    spatial = np.repeat(spatial.sum(axis=0, keepdims=True) / new.tubelet, new.tubelet, axis=0)
  return spatial.reshape(-1, spatial.shape[-1]).astype(np.float32)


def position_table(
  table: Float[np.ndarray, "positions width"], old: ImageConfig, new: ImageConfig
) -> Float[np.ndarray, "other_positions width"]:
  """Resizes a learned table to another grid by bilinear interpolation, antialiased; a class token keeps its position.

  Args:
    table: the positions of the old tower, that of a class token first.
    old: the tower that the table comes from.
    new: the tower that the table is made for.
  """
  first, grid = table[: old.class_token], table[old.class_token :]
  resized = _resize_matrix(old.grid, new.grid) @ np.asarray(grid, np.float64)
  return np.concatenate([first, resized.astype(np.float32)])
