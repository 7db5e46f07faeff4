"""Small checkpoints of every family that is imported, with random weights."""

import functools
from pathlib import Path

import jax
import numpy as np

from contrastive_jax.interop import big_vision, exports, imports, keymap
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.resolution import Resolution

SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}
TOWERS = {
  "vision": {"image_size": 16, "patch_size": 4, "transformer": SMALL},
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
      config = presets.resolve(preset, {**TOWERS, "vision": {**TOWERS["vision"], "resize": "squash"}})
    found[family] = root / family
    exports.write(f"{spec}:{root / family}", config, params, tokenizer(), resolution=resolution)
  config, params = model("siglip_ti16")
  found["big_vision"] = root / "big_vision"
  found["big_vision"].mkdir()
  arrays = keymap.to_theirs(big_vision.entries(config), params)
  np.savez(found["big_vision"] / "model.npz", **{f"params/{name}": array for name, array in arrays.items()})
  (found["big_vision"] / "tokenizer.json").write_bytes(tokenizer().definition()[2])
  return found


def read(family: str, folder: Path) -> imports.Imported:
  if family == "big_vision":
    return imports.read(f"big_vision:{folder / 'model.npz'}", f"file:{folder / 'tokenizer.json'}")
  return imports.read(f"{'open_clip' if family == 'open_clip' else 'huggingface'}:{folder}")
