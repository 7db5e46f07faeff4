"""Packed rows give each image, clip and caption the embedding that it has alone, and leak nothing between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import MeshSpec, put_batch

PATCH = 4
# Rows of (y, x) grids, packed in this order.
ROWS = [[(2, 3), (4, 1)], [(3, 2)], [(1, 6), (2, 2)], [(1, 4)]]
LENGTH = 16


def univitar(transformer=None, **vision) -> DualEncoderConfig:
  small = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "remat": "none"}
  return presets.resolve(
    "univitar_0.3b",
    {
      "image": {"patch_size": PATCH, "image_size": 16, "transformer": {**small, **(transformer or {})}, **vision},
      "text": {"transformer": {**small, "mlp_dim": 64}, "vocab_size": 50, "length": 8},
      "embed_dim": 24,
    },
  )


CONFIGS = {
  "univitar": univitar(),
  "mean": univitar(pool="mean"),
  "learned positions": univitar(position="learned", transformer={"rope": None}),
  "rotary 3d": univitar(transformer={"rope": "3d"}),
}


@functools.cache
def model(config):
  graphdef, _ = dual_encoder.abstract(config)
  params = dual_encoder.init(config, jax.random.key(0))
  # Positions and norms away from their initial values, so that every part matters.
  noisy = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), params)
  return graphdef, noisy


@functools.cache
def encoder(config):
  graphdef, _ = model(config)
  return jax.jit(lambda params, image: dual_encoder.merge(graphdef, params).encode_image(image))


def encode(config, image):
  return encoder(config)(model(config)[1], image)


def pictures(rng, frames=1):
  """Patches and coordinates of every image in `ROWS`, in order."""
  made = []
  for y, x in (grid for row in ROWS for grid in row):
    coords = np.indices((1, y, x)).reshape(3, -1).T.astype(np.int16)
    made.append((rng.integers(0, 256, (y * x, frames * PATCH * PATCH * 3), np.uint8), coords))
  return made


def packed(images, rng=None):
  """The images in their rows; padding is noise where there is a generator."""
  rows, width = len(ROWS), images[0][0].shape[1]
  patches = (
    np.zeros((rows, LENGTH, width), np.uint8) if rng is None else rng.integers(0, 256, (rows, LENGTH, width), np.uint8)
  )
  coords = np.zeros((rows, LENGTH, 3), np.int16) if rng is None else rng.integers(0, 9, (rows, LENGTH, 3), np.int16)
  segment_ids, locations, number = np.zeros((rows, LENGTH), np.int16), [], 0
  for row, grids in enumerate(ROWS):
    start = 0
    for segment in range(1, len(grids) + 1):
      pixels, places = images[number]
      patches[row, start : start + len(pixels)], coords[row, start : start + len(pixels)] = pixels, places
      segment_ids[row, start : start + len(pixels)] = segment
      locations.append((row, segment))
      start, number = start + len(pixels), number + 1
  return ImageBatch(patches, coords, segment_ids, np.array(locations, np.int32))


def alone(image):
  return ImageBatch(image[0][None], image[1][None])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_one_by_one(name, rng):
  config, images = CONFIGS[name], pictures(rng)
  together = encode(config, packed(images, rng))
  # Without segments a picture of 16 patches could be taken for one at the size of the table.
  single = jnp.concatenate([encode(config, alone(image)) for image in images])
  np.testing.assert_allclose(together, single, atol=1e-5)


@pytest.mark.parametrize("name", ["univitar", "learned positions"])
def test_padded_rows_are_one_by_one(name, rng):
  config, images = CONFIGS[name], pictures(rng)
  batch = ImageBatch(
    rng.integers(0, 256, (len(images), LENGTH, images[0][0].shape[1]), np.uint8),
    rng.integers(0, 9, (len(images), LENGTH, 3), np.int16),
    np.zeros((len(images), LENGTH), np.int16),
  )
  for row, (pixels, coords) in enumerate(images):
    batch.patches[row, : len(pixels)], batch.coords[row, : len(pixels)] = pixels, coords
    batch.segment_ids[row, : len(pixels)] = 1
  np.testing.assert_allclose(encode(config, batch), encode(config, packed(images)), atol=1e-5)


@pytest.mark.parametrize("name", ["univitar", "learned positions"])
def test_changing_one_image_changes_no_bit_of_another(name, rng):
  config, images = CONFIGS[name], pictures(rng)
  before = np.asarray(encode(config, packed(images)))
  for changed in (0, 1, 4):
    others = list(images)
    others[changed] = (255 - images[changed][0], images[changed][1])
    after = np.asarray(encode(config, packed(others)))
    same = (before == after).all(axis=1)
    np.testing.assert_array_equal(same, np.arange(len(images)) != changed)


def test_gradients_of_packed_images_are_those_of_single_ones(rng):
  config, images = CONFIGS["univitar"], pictures(rng)
  graphdef, params = model(config)
  weights = rng.standard_normal((len(images), config.embed_dim), np.float32)

  def loss(params, image, weights):
    return jnp.sum(dual_encoder.merge(graphdef, params).encode_image(image) * weights)

  grad = jax.jit(jax.grad(loss))
  together = grad(params, packed(images, rng), weights)
  single = [grad(params, alone(image), weights[k : k + 1]) for k, image in enumerate(images)]
  expected = jax.tree.map(lambda *parts: sum(parts), *single)

  def compare(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1e-3, np.abs(wanted).max()))

  jax.tree.map(compare, together, expected)


def test_packed_rows_are_pooled_where_they_lie(rng):
  """On four devices, whatever their mesh, the same embeddings; and no device sees another's tokens."""
  config, images = CONFIGS["univitar"], pictures(rng)
  batch = packed(images)
  # One pair of each row: pairs lie where their rows do.
  batch = dataclasses.replace(batch, locations=batch.locations[[0, 2, 3, 5]])
  graphdef, params = model(config)
  mesh = MeshSpec(data=2, fsdp=2).make(jax.devices()[:4])

  def embed(params, image):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return dual_encoder.merge(graphdef, params).encode_image(image)

  compiled = jax.jit(embed).lower(params, put_batch(mesh, batch)).compile()
  np.testing.assert_allclose(compiled(params, put_batch(mesh, batch)), encode(config, batch), atol=1e-5)
  assert "all-gather" not in compiled.as_text() and "all-reduce" not in compiled.as_text()


def clip_of(images):
  return [(np.concatenate([pixels, pixels], axis=1), coords) for pixels, coords in images]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_is_the_clip_of_two_equal_frames(name, rng):
  images = pictures(rng)
  still, moving = encode(CONFIGS[name], packed(images)), encode(CONFIGS[name], packed(clip_of(images)))
  np.testing.assert_allclose(still, moving, atol=2e-6)


def movie(rng, times=3):
  coords = np.indices((times, 2, 2)).reshape(3, -1).T.astype(np.int16)
  return rng.integers(0, 256, (1, times * 4, 2 * PATCH * PATCH * 3), np.uint8), coords[None]


@pytest.mark.parametrize(
  ("config", "knows_time"),
  [
    (univitar(), False),
    (univitar(time_position="learned"), True),
    (univitar(transformer={"rope": "3d"}), True),
  ],
  ids=["none", "learned", "rotary 3d"],
)
def test_only_a_code_of_time_tells_the_order_of_frames(config, knows_time, rng):
  patches, coords = movie(rng)
  backward = patches.reshape(1, 3, 4, -1)[:, ::-1].reshape(patches.shape)
  difference = np.abs(encode(config, ImageBatch(patches, coords)) - encode(config, ImageBatch(backward, coords))).max()
  assert difference > 1e-3 if knows_time else difference < 1e-6


def test_patches_of_other_sizes_are_refused(rng):
  patches, coords = movie(rng)
  with pytest.raises(UserError, match="need 48 for an image and 96 for a clip"):
    encode(univitar(), ImageBatch(patches[..., :60], coords))


# Captions.


@pytest.mark.parametrize(("pool", "causal"), [("eos", True), ("cls", False), ("mean", False), ("map", True)])
def test_packed_captions_are_padded_ones(pool, causal, rng):
  config = presets.resolve(
    "univitar_0.3b",
    {
      "image": {
        "patch_size": PATCH,
        "image_size": 16,
        "transformer": {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 8},
      },
      "text": {
        "pool": pool,
        "transformer": {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "causal": causal},
        "vocab_size": 50,
        "length": 8,
      },
      "embed_dim": 24,
    },
  )
  lengths = [3, 8, 5, 1, 7, 2]
  tokens, mask = np.zeros((6, 8), np.int32), np.arange(8) < np.array(lengths)[:, None]
  tokens[mask] = rng.integers(1, 50, mask.sum())
  rows = [[0, 1, 3], [2, 4], [5]]
  together, segment_ids = rng.integers(0, 50, (3, 14), np.int32), np.zeros((3, 14), np.int16)
  locations = np.zeros((6, 2), np.int32)
  for row, captions in enumerate(rows):
    start = 0
    for number, caption in enumerate(captions, 1):
      stop = start + lengths[caption]
      together[row, start:stop], segment_ids[row, start:stop] = tokens[caption, : lengths[caption]], number
      locations[caption], start = (row, number), stop
  graphdef, params = model(config)

  def loss(params, *args, **options):
    embedded = dual_encoder.merge(graphdef, params).encode_text(*args, **options)
    return jnp.sum(embedded * jnp.arange(24) * jnp.arange(6)[:, None]), embedded

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, padded), wanted = grad(params, tokens, mask)
  (_, packed_), found = grad(params, together, segment_ids=segment_ids, locations=locations)
  np.testing.assert_allclose(packed_, padded, atol=2e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max())), found["text"], wanted["text"]
  )


def test_towers_that_read_the_padding_refuse_packed_captions():
  config = presets.resolve("siglip_ti16", {"text": {"vocab_size": 50}})
  graphdef, params = dual_encoder.abstract(config)
  rows = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((3, 2), jnp.int32)

  def embed(params, tokens, locations):
    return dual_encoder.merge(graphdef, params).encode_text(tokens, segment_ids=tokens, locations=locations)

  with pytest.raises(UserError, match="cannot be packed for model\\.text\\.pool='last'"):
    jax.eval_shape(embed, params, *rows)
