"""Where a patch lies: learned tables, fixed sines and rotations, all read from its coordinates."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

_THETA = 10_000.0


def rope_angles(coords: Any, head_dim: int) -> Float[Array, "rows length half_head_dim"]:
  """Rotation angles of each patch: a quarter of the head's features pairs for y, a quarter for x.

  Args:
    coords: `[rows, length, 3]`, (t, y, x). Time does not rotate.
    head_dim: features of a head, divisible by 4.

  UniViTAR's convention (arXiv 2504.01792): theta 10000, frequencies theta^(-4 i / head_dim) along each axis.
  """
  frequencies = _THETA ** (-jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
  by_axis = coords[..., 1:].astype(jnp.float32)[..., None] * frequencies
  return by_axis.reshape(*coords.shape[:2], head_dim // 2)


def rotate(
  x: Float[Array, "rows length heads head_dim"], angles: Float[Array, "rows length half_head_dim"]
) -> Float[Array, "rows length heads head_dim"]:
  """Rotates feature i together with feature i + head_dim / 2 by angle i, in float32."""
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def sincos_2d(coords: Any, width: int) -> Float[Array, "rows length width"]:
  """Fixed sines and cosines of x, then of y (MoCo v3, arXiv 2104.02057, as in big_vision).

  Args:
    coords: `[rows, length, 3]`, (t, y, x).
    width: features of a token, a multiple of 4.
  """
  count = width // 4
  frequencies = _THETA ** (-jnp.arange(count, dtype=jnp.float32) / (count - 1))
  y = coords[..., 1].astype(jnp.float32)[..., None] * frequencies
  x = coords[..., 2].astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)


def resampled(table: Float[Array, "positions width"], coords: Any, segments: Any) -> Float[Array, "rows length width"]:
  """A learned square table, resampled to the grid of each image: linear and antialiased, as `jax.image.resize`.

  An image's grid is as large as its largest coordinates say. The table itself is read where the grids are equal.

  Args:
    table: positions in row-major order.
    coords: `[rows, length, 3]`, (t, y, x).
    segments: `[rows, length]` of the packed images, or None when a row is one image.
  """
  grid = round(table.shape[0] ** 0.5)
  along_y, along_x = (_resampling_weights(coords[..., axis], segments, grid) for axis in (1, 2))
  # Matrix products instead of gathers: their transpose scatters nothing, and they shard.
  return jnp.einsum("rly,rlx,yxw->rlw", along_y, along_x, table.reshape(grid, grid, -1))


def _resampling_weights(coordinate: Any, segments: Any, grid: int) -> Float[Array, "rows length grid"]:
  """Weights of the table's rows (or columns) for each patch."""
  coordinate = coordinate.astype(jnp.float32)
  if segments is None:
    extent = jnp.max(coordinate, axis=1, keepdims=True) + 1
  else:
    same = segments[:, :, None] == segments[:, None, :]
    extent = jnp.max(jnp.where(same, coordinate[:, None, :], 0), axis=2) + 1
  step = grid / extent
  centre = (coordinate + 0.5) * step - 0.5
  distance = jnp.abs(centre[..., None] - jnp.arange(grid)) / jnp.maximum(step, 1)[..., None]
  weights = jnp.maximum(1 - distance, 0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)
