"""Weights of an image tower at another patch size: the products they had, where that is possible."""

import dataclasses

import jax
import numpy as np
import pytest

from contrastive_jax.models import presets, resizing

BASE = presets.resolve("siglip_ti16").image


def tower(patch_size=8, image_size=32, **fields):
  return dataclasses.replace(BASE, patch_size=patch_size, image_size=image_size, **fields)


def test_equal_towers_change_nothing(rng):
  kernel, table = rng.standard_normal((192, 5), np.float32), rng.standard_normal((16, 5), np.float32)
  np.testing.assert_array_equal(resizing.patch_kernel(kernel, tower(), tower()), kernel)
  np.testing.assert_allclose(resizing.position_table(table, tower(), tower()), table, atol=1e-6)


@pytest.mark.parametrize("larger", [9, 12, 16])
def test_enlarged_patches_keep_their_embedding(larger, rng):
  kernel, patches = rng.standard_normal((192, 5), np.float32), rng.standard_normal((7, 8, 8, 3), np.float32)
  enlarged = jax.image.resize(patches, (7, larger, larger, 3), "bilinear").reshape(7, -1)
  resized = resizing.patch_kernel(kernel, tower(), tower(larger, 4 * larger))
  np.testing.assert_allclose(enlarged @ resized, patches.reshape(7, -1) @ kernel, atol=2e-4)


def test_reduced_patches_lose_the_least(rng):
  """No other kernel is nearer over patches of independent pixels: the gradient of the squared distance is zero."""
  kernel = rng.standard_normal((192, 5), np.float32)
  resized = resizing.patch_kernel(kernel, tower(), tower(4, 16)).astype(np.float64)
  basis = np.eye(192).reshape(192, 8, 8, 3)
  with jax.enable_x64(True):
    reduced = np.asarray(jax.image.resize(basis, (192, 4, 4, 3), "bilinear")).reshape(192, -1)
  gradient = reduced.T @ (reduced @ resized - kernel)
  assert np.abs(gradient).max() < 1e-5 * np.abs(reduced.T @ kernel).max()


def test_an_image_keeps_its_embedding_when_patches_become_tubelets(rng):
  kernel, patch = rng.standard_normal((192, 5), np.float32), rng.standard_normal((1, 192), np.float32)
  inflated = resizing.patch_kernel(kernel, tower(), tower(tubelet=2))
  np.testing.assert_allclose(np.tile(patch, 2) @ inflated, patch @ kernel, rtol=1e-5)
  back = resizing.patch_kernel(inflated, tower(tubelet=2), tower())
  np.testing.assert_allclose(back, kernel, rtol=1e-6)


def test_a_plane_of_positions_stays_a_plane():
  """Interpolation is exact for what is linear, away from the edges."""
  y, x = np.mgrid[:8, :8].reshape(2, -1).astype(np.float32)
  table = np.stack([y, x, 2 * y - x], axis=1)
  first = np.ones((1, 3), np.float32)
  old, new = tower(8, 64, class_token=True), tower(8, 128, class_token=True)
  resized = resizing.position_table(np.concatenate([first, table]), old, new)
  np.testing.assert_array_equal(resized[:1], first)
  inner = resized[1:].reshape(16, 16, 3)[1:-1, 1:-1]
  grid = (np.arange(1, 15) + 0.5) / 2 - 0.5
  np.testing.assert_allclose(inner[..., 0], np.broadcast_to(grid[:, None], (14, 14)), atol=1e-5)
  np.testing.assert_allclose(inner[..., 1], np.broadcast_to(grid[None, :], (14, 14)), atol=1e-5)
