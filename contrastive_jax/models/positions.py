"""Where a patch lies: learned tables, fixed sines and rotations, all read from its coordinates."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_THETA = 10_000.0


def rope_angles(coords: Any, head_dim: int, kind: str = "2d") -> Float[Array, "rows length half_head_dim"]:
  """Rotation angles of each patch, one for each two of the head's features.

  Args:
    coords: `[rows, length, 3]`, (t, y, x).
    head_dim: features of a head, divisible by 4.
    kind: "2d" gives half of the angles to y and half to x, and none to time: UniViTAR's convention (arXiv 2504.01792),
      theta 10000, frequencies theta^(-4 i / head_dim) along each axis. "3d" is ours: the lowest quarter of the
      frequencies of y and of x turns with t instead, at frequencies from 1 down to 1 / theta; the others stay as they
      are, so that a tower trained on images meets clips with little change. It needs a head_dim of 16.
  """
  count = head_dim // 4
  frequencies = _THETA ** (-jnp.arange(count, dtype=jnp.float32) / count)
  t, y, x = (coords[..., axis].astype(jnp.float32)[..., None] for axis in range(3))
  if kind == "2d":
    return jnp.concatenate([y * frequencies, x * frequencies], axis=-1)
  kept = count - count // 4
  # Spread over the whole range, so that neighbouring tubelets differ and distant ones do not repeat.
  along_t = t * _THETA ** (-jnp.arange(2 * (count - kept), dtype=jnp.float32) / max(1, 2 * (count - kept)))
  return jnp.concatenate([y * frequencies[:kept], x * frequencies[:kept], along_t], axis=-1)


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


def read(table: Float[Array, "positions width"], index: Any) -> Float[Array, "rows length width"]:
  """Rows of a small learned table; zero where `index`, `[rows, length]`, lies outside it.

  A matrix product instead of a gather, whose transpose is a scatter: slow on a TPU. It is exact in float32.
  """
  chosen = jax.nn.one_hot(index, table.shape[0], dtype=table.dtype)
  return jnp.einsum("rlp,pw->rlw", chosen, table, precision=jax.lax.Precision.HIGHEST)


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
  extent = _extent(coordinate.astype(jnp.int32), segments)
  coordinate = coordinate.astype(jnp.float32)
  step = grid / extent
  centre = (coordinate + 0.5) * step - 0.5
  distance = jnp.abs(centre[..., None] - jnp.arange(grid)) / jnp.maximum(step, 1)[..., None]
  weights = jnp.maximum(1 - distance, 0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _extent(coordinate: Any, segments: Any) -> Float[Array, "rows #length"]:
  """Patches along one axis of the image that each patch belongs to."""
  if segments is None:
    return (jnp.max(coordinate, axis=1, keepdims=True) + 1).astype(jnp.float32)
  # The largest coordinate of each segment, then handed back to its patches: linear in the length.
  segments = segments.astype(jnp.int32)

  def of_row(coordinate, segments):
    return jax.ops.segment_max(coordinate, segments, num_segments=segments.shape[0] + 1)[segments]

  return (jax.vmap(of_row)(coordinate, segments) + 1).astype(jnp.float32)
