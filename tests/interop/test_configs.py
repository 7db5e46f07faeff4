"""Published configs, as their repositories hold them, become the towers and the preprocessing that they describe."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.interop import (
  bert,
  big_vision,
  checkpoint_files,
  exports,
  huggingface,
  imports,
  keymap,
  open_clip,
  tokenizer_files,
)
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.training.initialize import initial_state
from contrastive_jax.training.state import StateSpec
from tests.interop import checkpoints

SQUARE = {"height": 224, "width": 224}
# openai/clip-vit-base-patch32, of 2021: sizes are plain numbers.
OPENAI = {
  "model_type": "clip",
  "projection_dim": 512,
  "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "eos_token_id": 2},
  "text_config_dict": None,
  "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 32, "image_size": 224},
  "vision_config_dict": None,
}
OPENAI_SEEN = {"size": 224, "crop_size": 224, "do_center_crop": True, "do_resize": True, "resample": 3}
# google/siglip-base-patch16-224 and google/siglip2-base-patch16-224: what is the default is left out.
SIGLIP = {"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}, "vision_config": {}}
SIGLIP2 = {"model_type": "siglip", "text_config": {"vocab_size": 256000, "projection_size": 768}, "vision_config": {}}
# google/siglip2-base-patch16-naflex.
NAFLEX = {"model_type": "siglip2", "text_config": {"vocab_size": 256000}, "vision_config": {"num_patches": 256}}
NAFLEX_SEEN = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16, "resample": 2}


def read(config, seen):
  return huggingface.read_config(config, seen, source="it")


def test_openais_clip_is_the_preset():
  ours = read(OPENAI, OPENAI_SEEN)
  assert ours == presets.resolve("clip_b32")
  later = {"size": {"shortest_edge": 224}, "crop_size": SQUARE, "do_convert_rgb": True}
  assert read(OPENAI, later) == read(OPENAI, {}) == ours


def test_the_second_description_of_a_tower_wins_as_in_transformers():
  # Some conversions of open_clip's weights keep the true activation there alone.
  config = OPENAI | {"vision_config_dict": {"hidden_act": "gelu", "num_hidden_layers": 2, "patch_size": 14}}
  vision = read(config, OPENAI_SEEN).image
  assert (vision.transformer.activation, vision.transformer.depth, vision.patch_size) == ("gelu", 2, 14)
  assert read(config, OPENAI_SEEN).text == read(OPENAI, OPENAI_SEEN).text


def test_siglips_differ_in_vocabulary_and_interpolation():
  first = read(SIGLIP, {"size": SQUARE, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
  second = read(SIGLIP2, {"size": SQUARE, "resample": 2})
  assert (first.image.resize, first.image.interpolation) == ("squash", "bicubic")
  assert second.image == dataclasses.replace(first.image, interpolation="bilinear")
  assert (first.text.vocab_size, second.text.vocab_size) == (32000, 256000)
  naflex = read(NAFLEX, NAFLEX_SEEN)
  assert (naflex.image.grid, naflex.image.interpolation) == (16, "bilinear")


@pytest.mark.parametrize(
  ("config", "seen", "message"),
  [
    (OPENAI, {"size": {"shortest_edge": 256}, "crop_size": SQUARE}, r"size=\{'shortest_edge': 256\}"),
    (OPENAI, {"size": {"shortest_edge": 224}, "do_center_crop": False}, "do_center_crop=False"),
    (OPENAI, {"size": 336, "crop_size": 336}, "size=336"),
    (SIGLIP, {"size": {"height": 256, "width": 224}}, "'height': 256"),
    (SIGLIP, {"size": SQUARE, "resample": 0}, "resample=0, known are 2"),
    (SIGLIP, {"size": SQUARE, "do_resize": False}, "do_resize=False"),
    (OPENAI | {"vision_config": {"image_size": [224, 336]}}, {}, r"image_size=\[224, 336\]"),
  ],
)
def test_preprocessing_that_we_lack_is_refused(config, seen, message):
  with pytest.raises(UserError, match=message):
    read(config, seen)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_what_is_written_of_clips_preprocessing_is_read_back(resize):
  config = presets.resolve("clip_b16", {"image": {"resize": resize, "interpolation": "bilinear"}})
  written = huggingface.write_config(config, "clip"), huggingface.write_preprocessing(config, "clip", 0)
  assert read(*json.loads(json.dumps(written))).image == config.image


# laion/CLIP-ViT-B-32-laion2B-s34B-b79K, with what open_clip calls OpenAI's weights below.
LAION = {
  "embed_dim": 512,
  "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
  "text_cfg": {"vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


def test_open_clips_b32_is_the_preset_but_for_its_activation():
  config = open_clip.read_config(LAION | {"quick_gelu": True}, {}, source="it")
  assert config == presets.resolve("clip_b32")
  plain = open_clip.read_config(LAION, {"resize_mode": "shortest"}, source="it")
  assert {plain.image.transformer.activation, plain.text.transformer.activation} == {"gelu"}


@pytest.mark.parametrize(
  ("config", "seen", "message"),
  [
    (LAION, {"resize_mode": "longest"}, "resize_mode='longest'"),
    ({"model_type": "clip"}, {}, "without embed_dim, vision_cfg, text_cfg"),
    (LAION | {"vision_cfg": {"image_size": [224, 336]}}, {}, r"image_size=\[224, 336\]"),
    (LAION | {"text_cfg": {"hf_tokenizer_name": "bert-base-uncased"}}, {}, "pool_type='argmax'"),
    (LAION | {"text_cfg": {"tokenizer_mode": "clips"}}, {}, "tokenizer_mode='clips'"),
  ],
)
def test_open_clip_configs_that_we_lack_are_refused(config, seen, message):
  with pytest.raises(UserError, match=message):
    open_clip.read_config(config, seen, source="it")


def test_only_towers_that_timm_can_build_are_written():
  assert open_clip.write_config(presets.resolve("siglip_b16"))["vision_cfg"]["timm_model_name"].endswith("siglip_224")
  with pytest.raises(UserError, match="images of 192 pixels"):
    open_clip.write_config(presets.resolve("siglip_b16", {"image": {"image_size": 192}}))


def pool(kinds: str, **modes: bool) -> str:
  modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds.split()]
  return bert.read_pool(modules, {"word_embedding_dimension": 384, **modes}, source="it")


def test_sentence_encoders_pool_as_their_files_say():
  mean = pool("Transformer Pooling Normalize", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
  first = pool("Transformer Pooling", pooling_mode_cls_token=True)  # Such as BAAI/bge-small-en-v1.5.
  assert (mean, first, bert.read_pool([], {}, source="it")) == ("mean", "cls", "mean")
  with pytest.raises(UserError, match="pooling_mode_max_tokens"):
    pool("Transformer Pooling", pooling_mode_max_tokens=True)
  with pytest.raises(UserError, match="Dense"):
    pool("Transformer Pooling Dense", pooling_mode_mean_tokens=True)


SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}
TOWERS = {
  "image": {"image_size": 16, "patch_size": 4, "transformer": SMALL},
  "text": {"transformer": SMALL, "vocab_size": 300, "length": 5},
  "embed_dim": 16,
}


def parameters(config, rng):
  _, abstract = dual_encoder.abstract(config)
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)


def test_naflex_models_keep_their_row_length(tmp_path, rng):
  config, tokenizer = presets.resolve("siglip_ti16", TOWERS), tokenizers.train_bpe(["a dog"], 300)
  params = parameters(config, rng)
  resolution = Resolution("naflex", lengths=(9, 25))
  folder = tmp_path / "out"
  assert exports.write(f"huggingface:{folder}", config, params, tokenizer, resolution=resolution) == "siglip2"
  assert imports.read(f"huggingface:{folder}").lengths == (25,)
  # Version 5 of transformers keeps this file's content inside another.
  inner = json.loads((folder / "preprocessor_config.json").read_text())
  (folder / "preprocessor_config.json").unlink()
  (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
  assert imports.read(f"huggingface:{folder}").lengths == (25,)


@pytest.mark.parametrize("resolution", [Resolution("native", max_tokens=64), Resolution.fixed(32)])
def test_runs_that_end_at_other_sizes_are_not_exported_as_squares(resolution, tmp_path):
  config, tokenizer = presets.resolve("siglip_ti16", TOWERS), tokenizers.train_bpe(["a dog"], 300)
  with pytest.raises(UserError, match=r"squares of model\.image\.image_size=16"):
    exports.write(f"huggingface:{tmp_path / 'out'}", config, {}, tokenizer, resolution=resolution)


def test_an_export_that_fails_leaves_nothing(tmp_path, rng, monkeypatch):
  config, tokenizer = presets.resolve("clip_ti16", TOWERS), tokenizers.train_bpe(["a dog"], 300)
  params = parameters(config, rng)

  def full(*_):
    raise OSError("no space left")

  with monkeypatch.context() as patched:
    patched.setattr(tokenizer_files, "write", full)
    with pytest.raises(OSError, match="no space left"):
      exports.write(f"huggingface:{tmp_path / 'out'}", config, params, tokenizer)
  assert not list(tmp_path.iterdir())
  exports.write(f"huggingface:{tmp_path / 'out'}", config, params, tokenizer)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  with pytest.raises(UserError, match="is there already"):
    exports.write(f"open_clip:{tmp_path / 'out'}", config, params, tokenizer)


def test_folders_that_are_no_checkpoint_say_so(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
  with pytest.raises(UserError, match="choose one of clip, siglip, siglip2, bert"):
    imports.read(f"huggingface:{tmp_path}")
  (tmp_path / "config.json").write_text("<html>")
  with pytest.raises(UserError, match="is a web page"):
    imports.read(f"huggingface:{tmp_path}")
  (tmp_path / "list.npz").write_bytes(b"")
  with pytest.raises(UserError, match="is empty"):
    checkpoint_files.read(tmp_path / "list.npz")


def bpe_folder(folder: Path, **settings) -> Path:
  folder.mkdir()
  (folder / "tokenizer.json").write_bytes(tokenizers.train_bpe(["a dog"], 300, lowercase=False).definition()[2])
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


def test_tokenizer_settings_are_honoured_or_refused(tmp_path):
  # Those of google/siglip2-*, but for the names of the tokens and the class, which would build other steps.
  gemma = {"tokenizer_class": "PreTrainedTokenizer", "pad_token": "<pad>", "eos_token": {"content": "<eos>"}}
  right = bpe_folder(tmp_path / "right", **gemma, add_bos_token=False, add_eos_token=True)
  cased, lowered = tokenizer_files.read(right), tokenizer_files.read(right, clean="lower")
  assert (cased(["A Dog"], 8)[0] != cased(["a dog"], 8)[0]).any()
  np.testing.assert_array_equal(lowered(["A Dog"], 8)[0], cased(["a dog"], 8)[0])
  # As transformers does, which looks for special tokens before it lower-cases.
  assert [(lowered([text], 16)[0] == lowered.token_id("<eos>")).sum() for text in ("a <eos>", "a <EOS>")] == [2, 1]
  with pytest.raises(UserError, match="tokenizer_class='GemmaTokenizer' pads them at their beginning"):
    tokenizer_files.read(bpe_folder(tmp_path / "left", tokenizer_class="GemmaTokenizer"))
  with pytest.raises(UserError, match="add_bos_token=True"):
    tokenizer_files.read(bpe_folder(tmp_path / "wrong", **gemma, add_bos_token=True, add_eos_token=True))
  plain = tokenizer_files.read(bpe_folder(tmp_path / "cased", tokenizer_class="SiglipTokenizer", do_lower_case=False))
  np.testing.assert_array_equal(plain(["A Dog!"], 8)[0], cased(["A Dog"], 8)[0])


def test_clips_merges_beside_the_weights_come_first(tmp_path):
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
  assert tokenizer_files.clip(tmp_path).vocab_size == 2 * 256 + 1 + 2


@pytest.fixture(scope="module")
def t5_model() -> bytes:
  """A SentencePiece model with the special tokens of T5's, which is SigLIP's: it pads, and SigLIP does not use that."""
  return checkpoints.sentencepiece_model(["a dog"])


@pytest.mark.parametrize("settings", [{}, {"pad_token": "</s>"}, {"pad_token": {"content": "</s>"}}])
def test_siglip_pads_with_the_end_of_text(settings, t5_model, tmp_path):
  (tmp_path / "spiece.model").write_bytes(t5_model)
  # Beside it lies a file for other readers, which the class does not read.
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer", **settings}))
  tokens, mask = tokenizer_files.read(tmp_path)(["A dog!", ""], 16)
  assert (tokens[~mask] == 1).all() and mask.sum() < 16
  np.testing.assert_array_equal(tokens[1], 1)


@pytest.mark.parametrize("kind", ["", "T5Tokenizer", "GemmaTokenizer"])
def test_a_lone_sentencepiece_model_is_siglips_or_refused(kind, t5_model, tmp_path):
  (tmp_path / "spiece.model").write_bytes(t5_model)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind or None}))
  with pytest.raises(UserError, match=rf"and {f'tokenizer_class={kind!r}' if kind else 'no class'} where SiglipT"):
    tokenizer_files.read(tmp_path)


CLEANED = {"HTML entities": "a &amp; d", "underscores": "a_d"}


@pytest.mark.parametrize("library", ["huggingface", "open_clip"])
@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "clip", "siglip", "big_vision"])
def test_captions_that_an_exported_tokenizer_reads_otherwise_are_named(kind, mended, library, tmp_path):
  if kind == "bpe":
    ours = tokenizers.JsonTokenizer(checkpoints.tokenizer().definition()[2], literal=True, mended=mended)
  elif kind == "clip":
    ours = tokenizers.ClipTokenizer(b"#version: 0.2\na b</w>\n", mended=mended)
  else:
    model = checkpoints.sentencepiece_model(["a d", "a amp d"])
    ours = tokenizers.SentencePieceTokenizer(model, True, True, "</s>", mended=mended, joined=kind == "siglip")
  tokenizer_files.write(ours, tmp_path, 16)
  clean = "canonicalize" if tokenizer_files.canonicalises(ours) else ""
  there = {"clean": clean, "mended": True} if library == "open_clip" else {}
  theirs = tokenizer_files.read(tmp_path, **there)
  odd = [name for name, text in CLEANED.items() if (ours([text], 16)[0] != theirs([text], 16)[0]).any()]
  assert tokenizer_files.cleaned_otherwise(ours, library) == odd


@pytest.mark.parametrize("option", ["add_dummy_prefix", "remove_extra_whitespaces"])
def test_a_sentencepiece_model_whose_spaces_siglip_would_change_is_refused(option, tmp_path):
  model = checkpoints.sentencepiece_model(["a dog"], **{option: False})
  (tmp_path / "spiece.model").write_bytes(model)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
  with pytest.raises(UserError, match=r"treats spaces otherwise .* with --tokenizer=sentencepiece:"):
    tokenizer_files.read(tmp_path)
  with pytest.raises(UserError, match=r"treats spaces otherwise .* cannot be exported"):
    tokenizer_files.write(tokenizers.SentencePieceTokenizer(model, canonical=True), tmp_path, 8)


@pytest.mark.parametrize(("vocab_size", "pad_id"), [(300, 1), (256_000, 0)])
def test_a_named_sentencepiece_model_is_siglips(vocab_size, pad_id, t5_model, tmp_path, rng):
  config = presets.resolve("siglip_ti16", TOWERS | {"text": {**TOWERS["text"], "vocab_size": vocab_size}})
  (tmp_path / "t5.model").write_bytes(t5_model)
  np.savez(tmp_path / "weights.npz", **keymap.to_theirs(big_vision.entries(config), parameters(config, rng)))
  tokenizer = imports.read(f"big_vision:{tmp_path / 'weights.npz'}", f"sentencepiece:{tmp_path / 't5.model'}").tokenizer
  assert tokenizer.pad_id == pad_id
  np.testing.assert_array_equal(tokenizer(["A DOG!"], 8)[0], tokenizer(["a dog!"], 8)[0])
  assert (tokenizer(["a dog!"], 8)[0] != tokenizer(["a dog"], 8)[0]).any()


def test_only_a_sentencepiece_model_that_drops_punctuation_is_exported(t5_model, tmp_path):
  with pytest.raises(UserError, match="drops punctuation"):
    tokenizer_files.write(tokenizers.SentencePieceTokenizer(t5_model, lowercase=True), tmp_path, 8)
  for pad, expected in (("", 0), ("</s>", 1)):
    ours = tokenizers.SentencePieceTokenizer(t5_model, lowercase=True, canonical=True, pad=pad)
    tokenizer_files.write(ours, tmp_path, 8)
    assert tokenizer_files.read(tmp_path).pad_id == ours.pad_id == expected
  with pytest.raises(UserError, match="no token '<fill>' for padding"):
    tokenizers.SentencePieceTokenizer(t5_model, pad="<fill>")


def test_a_text_tower_alone_does_not_start_both(tmp_path, rng):
  config = presets.resolve("siglip_ti16", TOWERS)
  params = {"text": parameters(config, rng)["text"]}
  imports.save(imports.Imported("text", config, params, tokenizers.train_bpe(["a dog"], 300)), tmp_path / "run")
  rules = MeshSpec()
  # Other patches than the imported config has for an image tower that is not there.
  wanted = presets.resolve("siglip_ti16", TOWERS | {"image": {**TOWERS["image"], "patch_size": 8}})
  mesh = rules.make(jax.devices()[:1])
  spec = StateSpec(wanted, optax.sgd(1.0), frozen=(), average=False, mesh=mesh, rules=rules)
  with pytest.raises(UserError, match="image/patch_embedding/kernel is missing there"):
    initial_state(spec, seed=0, init_from=str(tmp_path / "run"))
