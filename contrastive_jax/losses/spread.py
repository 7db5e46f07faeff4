"""Uniformity: how evenly embeddings spread over the sphere, within a tower and between two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax.bounds import Range
from contrastive_jax.errors import UserError
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.exponentials import with_mask
from contrastive_jax.losses.reductions import Sum

# The kernel of opposite unit vectors is e^(-4 t), which must be a normal float32 number.
SHARPNESS = Range(0, 20, above=True)


def uniformity(
  embeddings: Float[Array, "pairs dim"],
  *,
  t: float = 2.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `log mean exp(-t |x_j - x_k|^2)` over all j and k that differ: 0 where all are equal, else below.

  Args:
    embeddings: L2-normalised embeddings of one tower; the local shard inside `jax.shard_map`.
    t: sharpness of the kernel, above 0 and at most 20.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are not pushed
      apart and left out of the mean; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "ring" passes blocks of embeddings around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The value of the global batch, 0 where the mean is empty, and no metrics. The matrix is symmetric, so that value and
    gradient take two matrix products of size pairs x pairs x dim instead of three.

  Raises:
    UserError: for an unknown strategy, a tile below 1 or a `t` outside its range.

  Wang and Isola (arXiv 2005.10242), L_uniform, as the code of arXiv 2405.18570 computes it: without the diagonal.

  Examples:
    >>> float(uniformity(jnp.array([[1.0, 0.0], [0.0, 1.0]]))[0])
    -4.0
  """
  options = {"t": t, "group": group, "axis_name": axis_name}
  return _log_mean(embeddings, None, **options, strategy=strategy, tile=tile, ring_order=ring_order), {}


def cross_uniformity(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  *,
  t: float = 2.0,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `log mean exp(-t |image_j - text_k|^2)` over all j and k that differ.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    t: sharpness of the kernel, above 0 and at most 20.
    group: as in `uniformity`.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The value of the global batch, 0 where the mean is empty, and no metrics. It is `uniformity` where both towers give
    the same.

  Raises:
    UserError: for an unknown strategy, a tile below 1 or a `t` outside its range.

  L_xunif of Fahim et al., "It's Not a Modality Gap" (arXiv 2405.18570).

  Examples:
    >>> both = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> float(cross_uniformity(both, both)[0]), float(cross_uniformity(both, both[::-1])[0])
    (-4.0, 0.0)
  """
  options = {"t": t, "group": group, "axis_name": axis_name}
  return _log_mean(image, text, **options, strategy=strategy, tile=tile, ring_order=ring_order), {}


def _log_mean(rows, columns, *, t, group, axis_name, strategy, tile, ring_order) -> Float[Array, ""]:
  """Computes the logarithm of the mean kernel between rows and columns, or among the rows where columns are None."""
  pairwise.check(strategy, tile)
  if not SHARPNESS.holds(t):
    raise UserError(f"t={t} must be {SHARPNESS}")
  axes = pairwise.mesh_axes(axis_name)
  keys = pairwise.keys_of(group, len(rows), axes)
  within, columns = columns is None, lax.stop_gradient(rows) if columns is None else columns
  args = pairwise.vary((rows, columns, keys), rows, columns, axes=axes)
  sums = _sums(negatives.Sweep(axes, strategy, tile, ring_order), float(t), within, *args)
  total, count = (pairwise.global_sum(part, axes) for part in sums)
  some = count > 0
  return jnp.where(some, jnp.log(jnp.where(some, total, 1) / jnp.where(some, count, 1)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(sweep, t, within, rows, columns, keys):
  """Returns this device's share of the sum of the kernel, and of the number of its terms.

  The gradient is made in the forward sweep, where the kernel is at hand. `within` says that the columns are the rows,
  whose gradient is then twice that of one side.
  """

  def tile_fn(rows, columns, fresh):
    return (_tile_sums(*_kernel(rows, columns, fresh, t)),), ()

  empty = Sum.empty((len(rows), 2), negatives.accumulation_dtype(rows, columns))
  (sums,), _ = sweep(tile_fn, (rows, keys), (columns, keys), ((empty,), ()))
  return tuple(jnp.sum(sums.total, axis=0))


def _sums_forward(sweep, t, within, rows, columns, keys):
  dtype = negatives.accumulation_dtype(rows, columns)

  def tile_fn(rows, columns, fresh):
    kernel, mask = _kernel(rows, columns, fresh, t)
    sums = _tile_sums(kernel, mask)
    if not within:
      d_rows, d_columns = negatives.tile_gradients(rows[0], columns[0], kernel, jnp.asarray(2 * t, dtype))
      return (sums, d_rows), (d_columns,)
    slopes = lax.optimization_barrier(kernel.astype(rows[0].dtype))
    return (sums, Sum(4 * t * negatives.matmul(slopes, columns[0], "ij,jd->id"))), ()

  empty_rows = Sum.empty((len(rows), 2), dtype), Sum.empty(rows.shape, dtype)
  empty_columns = () if within else (Sum.empty(columns.shape, dtype),)
  (sums, d_rows), d_columns = sweep(tile_fn, (rows, keys), (columns, keys), (empty_rows, empty_columns))
  gradients = negatives.cast(d_rows, rows), *(negatives.cast(part, columns) for part in d_columns)
  return tuple(jnp.sum(sums.total, axis=0)), gradients


def _sums_backward(sweep, t, within, gradients, cotangents):
  scaled = tuple((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
  return (*scaled, None, None) if within else (*scaled, None)


_sums.defvjp(_sums_forward, _sums_backward)


def _kernel(rows: Any, columns: Any, fresh: Any, t: float) -> tuple[Array, Array]:
  """Returns the kernel of a tile, 0 where it does not count, and where it does: |x - y|^2 is 2 - 2 x y."""
  similarities, mask = with_mask(negatives.negatives_of(rows, columns, fresh))
  return jnp.where(mask, jnp.exp(2 * t * (similarities - 1)), 0), mask


def _tile_sums(kernel: Array, mask: Array) -> Sum:
  return Sum(jnp.stack([jnp.sum(kernel, axis=1), jnp.sum(mask, axis=1, dtype=kernel.dtype)], axis=1))
