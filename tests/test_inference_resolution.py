"""Embedding images and clips of many sizes: at native resolution, in rows of few lengths."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.inference import Model
from contrastive_jax.loading import load
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess import images as preprocess
from contrastive_jax.preprocess import native, tokenizers
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.video import ArrayClip
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.state import TrainState

TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "remat": "none"}
CONFIG = presets.resolve(
  "siglip_ti16",
  {
    "image": {"image_size": 8, "patch_size": 4, "tubelet": 2, "transformer": {**TOWER, "rope": "2d"}, "pool": "mean"},
    "text": {"vocab_size": 260, "length": 6, "transformer": TOWER},
    "embed_dim": 16,
  },
)
NATIVE = Resolution("native", min_tokens=2, max_tokens=20)
CLIPS = Resolution("native", min_tokens=1, max_tokens=24)
FRAMES = 4


def tokenizer(texts, length):
  return np.ones((len(texts), length), np.int32), np.ones((len(texts), length), bool)


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: dual_encoder.init(CONFIG, jax.random.key(0)))()


@pytest.fixture(scope="module")
def pictures():
  rng = np.random.default_rng(1)
  # Four lengths, in an order that sorting changes; native resolution reduces the large ones.
  sizes = [(16, 16), (8, 8), (16, 20), (4, 32), (7, 8), (160, 200), (20, 16), (8, 16), (17, 15)]
  return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def clips():
  rng = np.random.default_rng(2)
  return [ArrayClip(rng.integers(0, 256, (count, 12, 20, 3), dtype=np.uint8)) for count in (4, 11, 3)]


@jax.jit
def _embed(params, image):
  return dual_encoder.merge(dual_encoder.abstract(CONFIG)[0], params).encode_image(image)


def alone(params, patches, coords) -> np.ndarray:
  """An item in a row of its own length, straight through the tower."""
  segments = np.ones((1, len(patches)), np.int16)
  return np.asarray(_embed(params, ImageBatch(patches[None], coords[None], segments)))[0]


@pytest.fixture(scope="module")
def answers(params, pictures, clips):
  found = []
  for picture in pictures:
    size = native.fit(*picture.shape[:2], patch=4, min_tokens=2, max_tokens=20)
    found.append(alone(params, *native.patchify_clip(preprocess.resize(picture, *size)[None], 4, 1)))
  for clip, chosen in zip(clips, ([0, 1, 2, 3], [1, 4, 6, 9], [0, 1, 1, 2]), strict=True):
    # Two tubelets in time share the tokens of the clip.
    size = native.fit(12, 20, patch=4, min_tokens=1, max_tokens=12)
    frames = np.stack([preprocess.resize(clip.frames[index], *size) for index in chosen])
    found.append(alone(params, *native.patchify_clip(frames, 4, 2)))
  return np.stack(found)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (8, 8)])
def test_native_embeddings_are_those_of_each_image_alone(devices, batch_size, params, pictures, clips, answers):
  mesh = MeshSpec().make(jax.devices()[:devices])
  model = Model(
    CONFIG, params, tokenizer, resolution=NATIVE, clips=CLIPS, frames=FRAMES, mesh=mesh, batch_size=batch_size
  )
  images = len(pictures)
  np.testing.assert_allclose(model.encode_image(pictures), answers[:images], atol=3e-6)
  np.testing.assert_allclose(model.encode_image(clips), answers[images:], atol=3e-6)
  # Both at once, in any order.
  order = np.random.default_rng(3).permutation(len(answers))
  mixed = [[*pictures, *clips][index] for index in order]
  np.testing.assert_allclose(model.encode_image(mixed), answers[order], atol=3e-6)
  seen = model._image_towers[True]._cache_size()
  assert seen <= 2 * len(model.lengths)
  model.encode_image(mixed[::-1])
  model.encode_image(pictures)
  assert model._image_towers[True]._cache_size() <= 2 * len(model.lengths)


def test_fixed_resolution_shows_clips_as_squares(params, pictures, clips):
  model = Model(CONFIG, params, tokenizer, frames=FRAMES, batch_size=8)
  shown = [
    np.stack([preprocess.center_crop(clip.frames[k], 8) for k in clip_frames])
    for clip, clip_frames in zip(clips, ([0, 1, 2, 3], [1, 4, 6, 9], [0, 1, 1, 2]), strict=True)
  ]
  expected = [alone(params, *native.patchify_clip(frames, 4, 2)) for frames in shown]
  np.testing.assert_allclose(model.encode_image(clips), expected, atol=3e-6)
  assert model._image_towers[True]._cache_size() == 1
  both = model.encode_image([pictures[0], *clips, pictures[3]])
  np.testing.assert_allclose(both[1:4], expected, atol=3e-6)
  np.testing.assert_allclose(both[[0, 4]], model.encode_image([pictures[0], pictures[3]]), atol=3e-6)


def test_another_resolution_leaves_the_first_model_alone(params, pictures, answers):
  fixed = Model(CONFIG, params, tokenizer, batch_size=16)
  before = fixed.encode_image(pictures)
  other = fixed.with_resolution(NATIVE, CLIPS, FRAMES)
  np.testing.assert_allclose(other.encode_image(pictures), answers[: len(pictures)], atol=3e-6)
  np.testing.assert_array_equal(fixed.encode_image(pictures), before)
  with pytest.raises(UserError, match="frames=3"):
    fixed.with_resolution(NATIVE, frames=3)


def test_arrays_of_frames_are_clips(params, clips):
  model = Model(CONFIG, params, tokenizer, resolution=NATIVE, clips=CLIPS, frames=FRAMES, batch_size=4)
  np.testing.assert_array_equal(model.encode_image([clip.frames for clip in clips]), model.encode_image(clips))


STAGE = {
  "name": "last", "mode": "native", "size": 0, "min_tokens": 2, "max_tokens": 20, "lengths": [], "frames": 4,
  "video_size": 0, "video_max_tokens": 24, "video_share": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
  ("stages", "resolution", "clip_resolution", "frames"),
  [
    ([], Resolution.fixed(8), Resolution.fixed(8), 8),
    # A stage of a config may leave fields at their defaults.
    ([{"steps": 3}], Resolution.fixed(8), Resolution.fixed(8), 8),
    ([{}, STAGE], Resolution("native", 8, 2, 20), Resolution("native", max_tokens=24), 4),
    ([STAGE | {"mode": "naflex", "lengths": [9, 16], "video_max_tokens": 0, "size": 12}],
     Resolution("naflex", 12, 2, 20, (9, 16)), Resolution.fixed(12), 4),
    ([STAGE | {"mode": "fixed", "size": 16, "video_max_tokens": 0, "video_size": 8, "frames": 2}],
     Resolution("fixed", 16, 2, 20), Resolution.fixed(8), 2),
  ],
)  # fmt: skip
def test_a_run_is_opened_at_the_resolution_it_ended_with(
  stages, resolution, clip_resolution, frames, params, pictures, tmp_path
):
  run = {"model": dataclasses.asdict(CONFIG), "compute_dtype": "float32", "curriculum": stages}
  (tmp_path / "config.json").write_text(json.dumps(run))
  words = tokenizers.train_bpe(["a text"], vocab_size=260)
  words.save(tmp_path / "tokenizer")
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(TrainState(jnp.int32(3), params, {}, None), {"tokenizer": words.fingerprint})
    checkpoints.wait()
  model = load(tmp_path, batch_size=8)
  assert (model.views.resolution, model.views.clips, model.views.frames) == (resolution, clip_resolution, frames)
  assert model.encode_image(pictures[:2]).shape == (2, 16)
