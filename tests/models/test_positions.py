import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.models.positions import read, resampled, rope_angles, rotate


def _coords(height, width):
  return np.array([[(0, *divmod(index, width)) for index in range(height * width)]], np.int16)


def test_rotated_products_depend_on_relative_positions_only(rng):
  q, k = (jnp.asarray(rng.standard_normal((1, 12, 2, 8)), jnp.float32) for _ in range(2))

  def products(coords):
    angles = rope_angles(coords, 8)
    return jnp.einsum("rqhd,rkhd->rhqk", rotate(q, angles), rotate(k, angles))

  coords = _coords(3, 4)
  np.testing.assert_allclose(products(coords), products(coords + np.int16([0, 5, 9])), atol=1e-4)
  np.testing.assert_array_equal(products(coords), products(coords + np.int16([7, 0, 0])))  # Time does not rotate.
  stretched = products(coords * np.int16([1, 1, 2]))
  assert np.abs(products(coords) - stretched).max() > 0.1


def test_rotary_3d_knows_relative_time_and_leaves_images_alone(rng):
  q, k = (jnp.asarray(rng.standard_normal((1, 24, 2, 16)), jnp.float32) for _ in range(2))
  coords = np.concatenate([_coords(3, 4), _coords(3, 4) + np.int16([1, 0, 0])], axis=1)

  def products(coords, kind="3d"):
    angles = rope_angles(coords, 16, kind)
    return jnp.einsum("rqhd,rkhd->rhqk", rotate(q, angles), rotate(k, angles))

  np.testing.assert_allclose(products(coords), products(coords + np.int16([4, 5, 9])), atol=1e-4)
  assert np.abs(products(coords) - products(coords * np.int16([2, 1, 1]))).max() > 0.1  # Slower.
  assert np.abs(products(coords) - products(coords * np.int16([-1, 1, 1]))).max() > 0.1  # Backward.
  # The angles of an image are those of "2d", or zero.
  image = _coords(3, 4)
  flat, deep = rope_angles(image, 16)[0], rope_angles(image, 16, "3d")[0]
  for column in deep.T:
    assert not column.any() or any((column == other).all() for other in flat.T)


def test_small_tables_are_read_exactly(rng):
  table = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
  np.testing.assert_array_equal(read(table, np.array([[4, 0, 2, 0]])), np.asarray(table)[None, [4, 0, 2, 0]])
  gradient = jax.grad(lambda table: read(table, np.array([[4, 0, 0]])).sum())(table)
  np.testing.assert_array_equal(gradient, np.repeat([[2.0], [0], [0], [0], [1]], 3, axis=1))


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (8, 5)])
def test_table_is_resampled_as_an_image(shape, rng):
  table = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)
  expected = jax.image.resize(table.reshape(4, 4, 3), (*shape, 3), "linear", antialias=True).reshape(1, -1, 3)
  np.testing.assert_allclose(resampled(table, _coords(*shape), None), expected, atol=1e-5)


def test_each_packed_image_has_its_own_grid(rng):
  table = jnp.asarray(rng.standard_normal((9, 2)), jnp.float32)
  coords = np.concatenate([_coords(*shape) for shape in [(2, 2), (1, 4), (4, 1)]])
  segment_ids = np.repeat([[1, 2, 3]], 4, axis=1)
  packed = resampled(table, coords.reshape(1, 12, 3), segment_ids)
  np.testing.assert_allclose(packed.reshape(3, 4, 2), resampled(table, coords, None), atol=1e-6)


def test_resampling_takes_linear_memory():
  """A row of 16,384 tokens: nothing of length x length, which would be 268 MB even in bits of a byte."""
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in [((64, 8), jnp.float32), ((1, 16384, 3), jnp.int16), ((1, 16384), jnp.int16)]
  ]
  assert jax.jit(resampled).lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 16384**2 / 8
