"""Position codes of patches: learned tables, fixed sines and rotations, all computed from coordinates."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_THETA = 10_000.0


def rope_angles(coords: Any, head_dim: int, kind: str = "2d") -> Float[Array, "rows length half_head_dim"]:
  """Computes the rotation angles of each patch, one for every two features of a head.

  Args:
    coords: the (t, y, x) of each patch in its grid, `[rows, length, 3]`.
    head_dim: number of features of a head, a multiple of 4 and, for "3d", at least 16.
    kind: "2d" gives half of the angles to y and half to x, and none to time. This is UniViTAR's convention (arXiv
      2504.01792): theta is 10000, and the frequencies are theta^(-4 i / head_dim) along each axis. "3d" is our own: the
      lowest quarter of the frequencies of y and of x turns with t instead, at frequencies from 1 down to 1 / theta. The
      others stay as they are, so that a tower trained on images meets clips with little change.

  Examples:
    >>> coords = jnp.array([[[0, 0, 0], [0, 2, 3]]])
    >>> rope_angles(coords, head_dim=4).tolist()
    [[[0.0, 0.0], [2.0, 3.0]]]
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
  """Rotates feature i together with feature i + head_dim / 2 by angle i, in float32.

  Args:
    x: queries or keys.
    angles: the angles of each token, the same for all heads.

  Examples:
    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> jnp.round(rotate(x, jnp.full((1, 1, 1), jnp.pi / 2)), 3).ravel().tolist()
    [-0.0, 1.0]
  """
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def sincos_2d(coords: Any, width: int) -> Float[Array, "rows length width"]:
  """Computes fixed sines and cosines of x, then of y (MoCo v3, arXiv 2104.02057, as in big_vision).

  Args:
    coords: the (t, y, x) of each patch in its grid, `[rows, length, 3]`.
    width: number of features of a token, a multiple of 4 and at least 8.

  Examples:
    >>> sincos_2d(jnp.array([[[0, 0, 0]]]), width=8).tolist()
    [[[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]]
  """
  count = width // 4
  frequencies = _THETA ** (-jnp.arange(count, dtype=jnp.float32) / (count - 1))
  y = coords[..., 1].astype(jnp.float32)[..., None] * frequencies
  x = coords[..., 2].astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)


def read(table: Float[Array, "positions width"], index: Any) -> Float[Array, "rows length width"]:
  """Reads rows of a small learned table by a matrix product, which is exact in float32.

  The gradient of a gather is a scatter, and that is slow on a TPU.

  Args:
    table: one row for each position.
    index: the row of each token, `[rows, length]`; a token whose row is not in the table gets zeros.

  Examples:
    >>> read(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1, 0, 7]])).tolist()
    [[[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]]
  """
  chosen = jax.nn.one_hot(index, table.shape[0], dtype=table.dtype)
  return jnp.einsum("rlp,pw->rlw", chosen, table, precision=jax.lax.Precision.HIGHEST)


def resampled(
  table: Float[Array, "positions width"], coords: Any, segment_ids: Any, grids: Any = None
) -> Float[Array, "rows length width"]:
  """Resamples a learned square table to the grid of each image, linear and antialiased like `jax.image.resize`.

  Where the grid of an image equals that of the table, the table is read unchanged.

  Args:
    table: one row for each position of the square, in row-major order.
    coords: the (t, y, x) of each patch in its grid, `[rows, length, 3]`.
    segment_ids: which image of its row each patch belongs to, `[rows, length]`; None when a row is one image.
    grids: the size along (t, y, x) of the grid of each patch, `[rows, length, 3]`; None when no patches are missing, so
      that the largest coordinates of an image say it.

  Examples:
    >>> table = jnp.array([[0.0], [1.0], [2.0], [3.0]])  # 2 x 2 positions of one feature.
    >>> resampled(table, jnp.array([[[0, 0, 0]]]), None).tolist()  # An image of a single patch gets their mean.
    [[[1.5]]]
  """
  grid = round(table.shape[0] ** 0.5)

  def extent(axis):
    return _extent(coords[..., axis].astype(jnp.int32), segment_ids) if grids is None else grids[..., axis]

  along_y, along_x = (_resampling_weights(coords[..., axis], extent(axis), grid) for axis in (1, 2))
  # Matrix products instead of gathers: their transpose scatters nothing, and they shard.
  return jnp.einsum("rly,rlx,yxw->rlw", along_y, along_x, table.reshape(grid, grid, -1))


def _resampling_weights(coordinate: Any, extent: Any, grid: int) -> Float[Array, "rows length grid"]:
  """Computes for each patch the weights of the table's rows, or of its columns."""
  coordinate = coordinate.astype(jnp.float32)
  step = grid / extent.astype(jnp.float32)
  centre = (coordinate + 0.5) * step - 0.5
  distance = jnp.abs(centre[..., None] - jnp.arange(grid)) / jnp.maximum(step, 1)[..., None]
  weights = jnp.maximum(1 - distance, 0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _extent(coordinate: Any, segment_ids: Any) -> Float[Array, "rows #length"]:
  """Counts the patches along one axis of the image that each patch belongs to."""
  if segment_ids is None:
    return (jnp.max(coordinate, axis=1, keepdims=True) + 1).astype(jnp.float32)
  # The largest coordinate of each segment, then handed back to its patches: linear in the length.
  segment_ids = segment_ids.astype(jnp.int32)

  def of_row(coordinate, segment_ids):
    return jax.ops.segment_max(coordinate, segment_ids, num_segments=segment_ids.shape[0] + 1)[segment_ids]

  return (jax.vmap(of_row)(coordinate, segment_ids) + 1).astype(jnp.float32)
