import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import NonFiniteError, UserError
from contrastive_jax.evaluation.tasks import Encoder
from contrastive_jax.inference import Model
from contrastive_jax.loading import load
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess import images as preprocess
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.state import TrainState

TOWER = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "remat": "none"}
CONFIG = presets.resolve(
  "siglip_ti16",
  {
    "image": {"image_size": 10, "patch_size": 4, "transformer": TOWER},
    "text": {"vocab_size": 97, "length": 6, "transformer": TOWER},
    "embed_dim": 16,
  },
)


class Letters:
  """A tokenizer: one token a letter."""

  def __init__(self):
    self.seen = []

  def __call__(self, texts, length):
    self.seen.extend(texts)
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
      codes = [1 + ord(letter) % 96 for letter in text[:length]]
      tokens[row, : len(codes)] = codes
    return tokens, tokens > 0


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: dual_encoder.init(CONFIG, jax.random.key(0)))()


@pytest.fixture(scope="module")
def model(params):
  return Model(CONFIG, params, Letters(), batch_size=8)


@pytest.fixture(scope="module")
def pictures():
  rng = np.random.default_rng(1)
  return [rng.integers(0, 256, (10 + i % 3, 10 + i % 2, 3), dtype=np.uint8) for i in range(19)]


TEXTS = [f"caption {i}"[i % 4 :] for i in range(19)]


@pytest.fixture(scope="module")
def answers(params, pictures):
  """All rows in one unpadded batch on one device, straight through the towers."""
  cropped = np.stack([preprocess.center_crop(image, 10)[:8, :8] for image in pictures])

  @jax.jit
  def embed(params, image, text):
    towers = dual_encoder.merge(dual_encoder.abstract(CONFIG)[0], params)
    return towers.encode_image(image), towers.encode_text(*text)

  return jax.device_get(embed(params, preprocess.patchify(cropped, 4), Letters()(TEXTS, 6)))


@pytest.mark.parametrize(
  ("devices", "mesh", "batch_size"),
  [(1, MeshSpec(), 5), (2, MeshSpec(), 32), (8, MeshSpec(), 3), (8, MeshSpec(data=2, fsdp=2, tensor=2), 8)],
)
def test_embeddings_do_not_depend_on_devices_or_batch_size(devices, mesh, batch_size, params, pictures, answers):
  some = Model(CONFIG, params, Letters(), mesh=mesh.make(jax.devices()[:devices]), batch_size=batch_size)
  images, texts = some.encode_image(pictures), some.encode_text(TEXTS)
  assert images.dtype == texts.dtype == np.float32
  np.testing.assert_allclose(images, answers[0], atol=2e-6)
  np.testing.assert_allclose(texts, answers[1], atol=2e-6)
  np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)


def test_each_tower_is_compiled_once_whatever_the_number_of_rows_and_parameters(model, params, pictures):
  scaled = jax.tree.map(lambda leaf: 1.5 * leaf, params)
  other = model.with_params(scaled)
  for count in (1, 8, 9, 19):
    model.encode_image(pictures[:count])
    model.encode_text(TEXTS[:count])
    other.encode_image(pictures[:count])
    other.encode_text(TEXTS[:count])
  assert model._image_towers[True]._cache_size() == model._text_tower._cache_size() == 1
  assert other._image_towers is model._image_towers


def test_features_are_what_the_projection_sees(params, pictures):
  vision = dataclasses.replace(CONFIG.image, projection=True)
  kernel = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
  text = {**params["text"], "projection": {"kernel": kernel, "bias": np.zeros(12, np.float32)}}
  projecting = {**params, "image": {**params["image"], "projection": {"kernel": kernel}}, "text": text}
  model = Model(dataclasses.replace(CONFIG, image=vision, embed_dim=12), projecting, Letters(), batch_size=8)
  features = model.encode_image(pictures, projected=False)
  assert features.shape == (len(pictures), 16)
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
  expected = features @ kernel
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(model.encode_image(pictures), expected, atol=1e-5)


def test_with_params_embeds_with_these_and_leaves_the_first_model_alone(model, params, answers):
  negated = jax.tree.map(lambda leaf: -leaf, params["text"]["projection"])
  other = model.with_params({**params, "text": {**params["text"], "projection": negated}})
  np.testing.assert_allclose(other.encode_text(TEXTS), -answers[1], atol=2e-6)
  np.testing.assert_allclose(model.encode_text(TEXTS), answers[1], atol=2e-6)


def test_parameters_on_the_mesh_are_not_copied(model):
  again = model.with_params(model.params)
  assert all(a is b for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True))


def test_parameters_are_split_over_fsdp(params):
  mesh = MeshSpec(data=1, fsdp=8).make()
  sharded = Model(CONFIG, jax.device_get(params), Letters(), mesh=mesh)
  held = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(sharded.params)]
  assert min(held) == 1 / 8


def test_padding_is_read_once(params):
  tokenizer = Letters()
  Model(CONFIG, params, tokenizer, batch_size=8).encode_text(TEXTS[:3])
  assert tokenizer.seen == TEXTS[:3]


def test_images_may_be_arrays_pil_images_or_paths(model, pictures, answers, tmp_path):
  Image.fromarray(pictures[2]).save(tmp_path / "2.png")
  Image.fromarray(pictures[3]).save(tmp_path / "3.png")
  mixed = [pictures[0], Image.fromarray(pictures[1]), tmp_path / "2.png", str(tmp_path / "3.png")]
  np.testing.assert_allclose(model.encode_image(mixed), answers[0][:4], atol=2e-6)
  stacked = np.stack([pictures[0]] * 3)
  np.testing.assert_allclose(model.encode_image(stacked), answers[0][[0, 0, 0]], atol=2e-6)


def test_nothing_in_nothing_out(model):
  assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 16)
  assert model.zero_shot([], ["a", "b"]).shape == (0, 2)


def test_zero_shot_is_the_softmax_over_mean_prompts(model, pictures):
  classes, templates = ["cat", "dog", "owl"], ["{}", "a {}"]
  prompts = model.encode_text([t.format(c) for c in classes for t in templates]).astype(np.float64).reshape(3, 2, -1)
  weights = prompts.mean(axis=1)
  weights /= np.linalg.norm(weights, axis=1, keepdims=True)
  logits = 10.0 * model.encode_image(pictures).astype(np.float64) @ weights.T
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(model.zero_shot(pictures, classes, templates), expected, rtol=1e-4)


def test_scale_and_bias(model, params):
  assert model.logit_scale == pytest.approx(10.0)
  assert model.logit_bias == pytest.approx(-10.0)
  config = dataclasses.replace(CONFIG, init_logit_bias=None)
  without = {name: value for name, value in params.items() if name != "logit_bias"}
  assert Model(config, without, Letters()).logit_bias is None
  assert isinstance(model, Encoder)


def test_a_bar_changes_nothing(params, pictures, answers, capsys):
  shown = Model(CONFIG, params, Letters(), batch_size=8, progress=True)
  np.testing.assert_allclose(shown.encode_image(pictures), answers[0], atol=2e-6)


def test_a_run_directory_is_loaded(params, pictures, tmp_path):
  tokenizer = tokenizers.train_bpe(TEXTS, vocab_size=260)
  config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=tokenizer.vocab_size))
  first = jax.jit(lambda: dual_encoder.init(config, jax.random.key(1)))()
  second = jax.tree.map(lambda leaf: leaf + 0.1, first)
  (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config), "compute_dtype": "float32"}))
  tokenizer.save(tmp_path / "tokenizer")
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    # The average holds what is trained: here the text tower alone.
    for step, weights, average in ((3, first, None), (7, first, {"text": second["text"]})):
      about = {"tokenizer": tokenizer.fingerprint}
      checkpoints.save(TrainState(jnp.int32(step), weights, {}, average), about)
    checkpoints.wait()
  newest, older = load(tmp_path, batch_size=8), load(tmp_path, step=3, batch_size=8)
  assert (newest.step, older.step) == (7, 3)
  expected = Model(config, {**first, "text": second["text"]}, tokenizer, batch_size=8)
  np.testing.assert_allclose(newest.encode_text(TEXTS), expected.encode_text(TEXTS), atol=2e-6)
  np.testing.assert_allclose(newest.encode_image(pictures), expected.encode_image(pictures), atol=2e-6)
  np.testing.assert_allclose(older.encode_text(TEXTS), expected.with_params(first).encode_text(TEXTS), atol=2e-6)
  with pytest.raises(UserError, match="no checkpoint of step 5"):
    load(tmp_path, step=5)
  tokenizers.train_bpe(["other"], vocab_size=260).save(tmp_path / "tokenizer")
  with pytest.raises(UserError, match="not the tokenizer"):
    load(tmp_path)
  with pytest.raises(UserError, match="it has no config"):
    load(tmp_path / "nowhere")


def test_one_item_instead_of_a_list_is_refused(model, pictures):
  with pytest.raises(UserError, match="list of images"):
    model.encode_image(pictures[0])
  with pytest.raises(UserError, match="list of texts"):
    model.encode_text("a dog")
  with pytest.raises(UserError, match="batch_size=0"):
    Model(CONFIG, model.params, Letters(), batch_size=0)


def test_similarity_is_the_cosine_of_each_pair(model, pictures):
  expected = model.encode_image(pictures[:3]).astype(np.float64) @ model.encode_text(["a", "b"]).astype(np.float64).T
  np.testing.assert_allclose(model.similarity(pictures[:3], iter(["a", "b"])), expected, atol=1e-6)
  assert model.similarity([], ["a"]).shape == (0, 1) and model.similarity(pictures[:1], []).shape == (1, 0)
  assert "embed_dim=16" in repr(model)


def test_a_picture_that_cannot_be_decoded_is_named(model, pictures, tmp_path):
  (tmp_path / "bad.png").write_bytes(b"no picture")
  with pytest.raises(preprocess.DecodeError, match=r"images\[1\] \('.*bad\.png'\)") as caught:
    model.encode_image([pictures[0], tmp_path / "bad.png"])
  assert "BytesIO" not in str(caught.value)
  with pytest.raises(UserError, match=r"images\[1\] is float64"):
    model.encode_image([pictures[0], pictures[1] / 255])


@pytest.mark.parametrize(
  "arguments",
  [
    ("cat",), (["cat"],), (["a", "b"], ["{0}"]), (["a", "b"], "{}"),
    # What is one text to the model: it reads so many tokens, and this tokenizer makes one of "a" and the letter 96 on.
    (["one", "a " * 40 + "x", "a " * 40 + "y"],), (["a", "b"], ["the " * 40 + "{}"]),
    (["a", "\N{LATIN CAPITAL LETTER A WITH ACUTE}"],),
  ],
)  # fmt: skip
def test_zero_shot_refuses_what_would_give_wrong_probabilities(model, pictures, arguments):
  with pytest.raises(UserError, match=r"classes|templates"):
    model.zero_shot(pictures[:1], *arguments)


@pytest.mark.parametrize(
  ("name", "content", "kind"),
  [("config.json", '{"model_type": "siglip"}', "huggingface"), ("open_clip_config.json", "{}", "open_clip")],
)
def test_weights_of_another_library_say_what_to_run(tmp_path, name, content, kind):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=rf"convert\.py --from={kind}:.* --to=FOLDER"):
    load(tmp_path)


def test_embeddings_that_overflow_are_refused(params, pictures):
  """Parameters may all be finite, and what they compute is not."""
  huge = {**params, "text": jax.tree.map(lambda leaf: leaf * 1e30, params["text"])}
  model = Model(CONFIG, huge, Letters(), batch_size=8)
  with pytest.raises(NonFiniteError, match="3 of 3 embeddings are no unit vectors"):
    model.encode_text(TEXTS[:3])
  assert model.encode_image(pictures[:2]).shape == (2, CONFIG.embed_dim)
