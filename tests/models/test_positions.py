import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.models.positions import resampled, rope_angles, rotate


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


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (8, 5)])
def test_table_is_resampled_as_an_image(shape, rng):
  table = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)
  expected = jax.image.resize(table.reshape(4, 4, 3), (*shape, 3), "linear", antialias=True).reshape(1, -1, 3)
  np.testing.assert_allclose(resampled(table, _coords(*shape), None), expected, atol=1e-5)


def test_each_packed_image_has_its_own_grid(rng):
  table = jnp.asarray(rng.standard_normal((9, 2)), jnp.float32)
  coords = np.concatenate([_coords(*shape) for shape in [(2, 2), (1, 4), (4, 1)]])
  segments = np.repeat([[1, 2, 3]], 4, axis=1)
  packed = resampled(table, coords.reshape(1, 12, 3), segments)
  np.testing.assert_allclose(packed.reshape(3, 4, 2), resampled(table, coords, None), atol=1e-6)
