"""Small checkpoints of every family that is imported, with random weights."""

import functools
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from contrastive_jax.interop import bert, big_vision, checkpoint_files, exports, imports, keymap
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.resolution import Resolution

SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}
TOWERS = {
  "image": {"image_size": 16, "patch_size": 4, "transformer": SMALL},
  "text": {"transformer": SMALL, "vocab_size": 300, "length": 5},
  "embed_dim": 16,
}


def model(preset: str):
  config = presets.resolve(preset, TOWERS)
  _, abstract = dual_encoder.abstract(config)
  rng = np.random.default_rng(0)
  return config, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)


@functools.cache
def tokenizer() -> tokenizers.JsonTokenizer:
  return tokenizers.train_bpe(["a dog", "two cats"], 300)


def write_all(root: Path) -> dict[str, Path]:
  """One small checkpoint of each family, as its own library writes it, in folders below `root`."""
  found = {}
  for family, preset, spec in (
    ("clip", "clip_ti16", "huggingface"),
    ("siglip", "siglip_ti16", "huggingface"),
    ("siglip2", "siglip_ti16", "huggingface"),
    ("open_clip", "clip_ti16", "open_clip"),
  ):
    config, params = model(preset)
    resolution = Resolution("naflex", lengths=(16,)) if family == "siglip2" else None
    if family == "siglip":
      config = presets.resolve(preset, {**TOWERS, "image": {**TOWERS["image"], "resize": "squash"}})
    found[family] = root / family
    exports.write(f"{spec}:{root / family}", config, params, tokenizer(), resolution=resolution)
  config, params = model("siglip_ti16")
  found["big_vision"] = root / "big_vision"
  found["big_vision"].mkdir()
  arrays = keymap.to_theirs(big_vision.entries(config), params)
  np.savez(found["big_vision"] / "model.npz", **{f"params/{name}": array for name, array in arrays.items()})
  (found["big_vision"] / "tokenizer.json").write_bytes(tokenizer().definition()[2])
  found["bert"] = _write_bert(root / "bert")
  for family, source, kind in (("pieces", "siglip", _pieces), ("merges", "clip", _merges)):
    found[family] = root / family
    shutil.copytree(found[source], root / family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
      (root / family / name).unlink()
    kind(root / family)
  return found


# The files of sentence-transformers/all-MiniLM-L6-v2, with a smaller model.
_BERT = {
  **{"_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"], "model_type": "bert"},
  **{"attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu", "use_cache": True},
  **{"hidden_dropout_prob": 0.1, "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24},
  **{"layer_norm_eps": 1e-12, "max_position_embeddings": 12, "num_attention_heads": 2, "num_hidden_layers": 1},
  **{"pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.8.2", "type_vocab_size": 2},
  "vocab_size": 20,
}
_SENTENCES = {
  "modules.json": [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
  ],
  "1_Pooling/config.json": {
    **{"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    **{"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False},
  },
  "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False},
  "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0", "pytorch": "1.8.1"}},
  "special_tokens_map.json": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"},
  "tokenizer_config.json": {
    **{"do_lower_case": True, "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"},
    **{"mask_token": "[MASK]", "tokenize_chinese_chars": True, "strip_accents": None, "model_max_length": 512},
    **{"name_or_path": "nreimers/MiniLM-L6-H384-uncased", "tokenizer_class": "BertTokenizer", "never_split": None},
    **{"special_tokens_map_file": "special_tokens_map.json", "do_basic_tokenize": True},
  },
}


def _write_bert(folder: Path) -> Path:
  (folder / "1_Pooling").mkdir(parents=True)
  for name, content in {"config.json": _BERT, **_SENTENCES}.items():
    (folder / name).write_text(json.dumps(content))
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words = {word: number for number, word in enumerate([*special, *["a", "dog", "two", "cats", "##s", "b", "c", "d"]])}
  made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
  made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  made.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
  made.add_special_tokens(special)
  made.enable_truncation(128)
  made.enable_padding(pad_id=0, pad_token="[PAD]")
  made.save(str(folder / "tokenizer.json"))
  config = bert.read_config(_BERT, pool="mean", source="it")
  _, abstract = dual_encoder.abstract(config)
  rng = np.random.default_rng(1)
  text = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract["text"])
  arrays = keymap.to_theirs(bert.entries(config.text), {"text": text})
  arrays["embeddings.token_type_embeddings.weight"] = np.zeros((2, 16), np.float32)
  checkpoint_files.write_safetensors(folder / "model.safetensors", arrays)
  return folder


def sentencepiece_model(captions: Sequence[str], **options) -> bytes:
  """A SentencePiece model with the special tokens of T5's, and with options of the trainer."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*captions] * 20),
    model_writer=model,
    **{"vocab_size": 20, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options,
    **{"minloglevel": 2, "hard_vocab_limit": False},
  )
  return model.getvalue()


def _pieces(folder: Path) -> None:
  (folder / "spiece.model").write_bytes(sentencepiece_model(["a dog", "two cats"]))
  # That of google/siglip-base-patch16-224, but for its token decoder.
  settings = {
    **{"additional_special_tokens": [], "clean_up_tokenization_spaces": True, "do_lower_case": True},
    **{"eos_token": "</s>", "model_input_names": ["input_ids"], "model_max_length": 64, "pad_token": "</s>"},
    **{"processor_class": "SiglipProcessor", "sp_model_kwargs": {}, "tokenizer_class": "SiglipTokenizer"},
    "unk_token": "<unk>",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _merges(folder: Path) -> None:
  """CLIP's own kind of tokenizer with few merges, and a table of embeddings for its tokens."""
  merges = "#version: 0.2\na t</w>\nd o\n"
  (folder / "merges.txt").write_text(merges)
  made = tokenizers.ClipTokenizer(merges.encode())
  (folder / "vocab.json").write_text(json.dumps(made.model()["vocab"]))
  # That of openai/clip-vit-base-patch32.
  marker = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
  settings = {
    **{"unk_token": marker, "bos_token": marker | {"content": "<|startoftext|>"}, "eos_token": marker},
    **{"pad_token": "<|endoftext|>", "add_prefix_space": False, "errors": "replace", "do_lower_case": True},
    **{"name_or_path": "openai/clip-vit-base-patch32", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    "special_tokens_map_file": "./special_tokens_map.json",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  config = json.loads((folder / "config.json").read_text())
  config["text_config"] |= {"vocab_size": made.vocab_size, "eos_token_id": made.vocab_size - 1}
  (folder / "config.json").write_text(json.dumps(config))
  arrays = checkpoint_files.read(folder / "model.safetensors")
  width = arrays["text_model.embeddings.token_embedding.weight"].shape[1]
  arrays["text_model.embeddings.token_embedding.weight"] = np.ones((made.vocab_size, width), np.float32)
  checkpoint_files.write_safetensors(folder / "model.safetensors", arrays)


def read(family: str, folder: Path) -> imports.Imported:
  if family == "big_vision":
    return imports.read(f"big_vision:{folder / 'model.npz'}", f"file:{folder / 'tokenizer.json'}")
  return imports.read(f"{'open_clip' if family == 'open_clip' else 'huggingface'}:{folder}")
