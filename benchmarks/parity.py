"""How far imported and exported models are from the libraries they come from and go to, as a table.

  make .venv/slow; python -m benchmarks.parity        # true B sizes, random weights; a few minutes
  python -m benchmarks.parity --small

Entries of unit vectors of images and of captions, and logits over the largest logit: the largest difference of each.
The round trip is from theirs to ours to theirs.
"""

import os
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from contrastive_jax import load
from contrastive_jax.interop import exports, imports

_SMALL = flags.DEFINE_bool("small", False, "Towers of a few layers instead of true sizes.")
_PARTS = ("image", "text", "logits")


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  from benchmarks import reference_models as peers  # With PyTorch, which nothing else here needs.

  print(", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "open_clip_torch")))
  print(f"{'':24}{'import: ' + ', '.join(_PARTS):>34}{'export: ' + ', '.join(_PARTS):>34}{'round trip':>16}")
  families = [("huggingface", name) for name in ("clip", "siglip", "siglip2")]
  families += [("open_clip", name) for name in (("clip",) if _SMALL.value else ("clip", "siglip"))]
  for library, family in families:
    with tempfile.TemporaryDirectory() as folder:
      compare(peers, Path(folder), library, family)


def compare(peers, folder: Path, library: str, family: str) -> None:
  """Prints one row."""
  build = peers.huggingface if library == "huggingface" else peers.open_clip
  reference = build(family, folder / "theirs", true_size=not _SMALL.value)
  imports.save(imports.read(f"{library}:{folder / 'theirs'}"), folder / "ours")
  model = load(folder / "ours", batch_size=8)
  images = peers.pixels(model.config.image.image_size)
  tokens, mask = model.tokenizer(peers.CAPTIONS, model.config.text.length)
  image, text = model.encode_image(list(images)), model.encode_text(list(peers.CAPTIONS))
  ours = image, text, model.logit_scale * image @ text.T + (model.logit_bias or 0.0)

  def outputs(theirs):
    if library == "huggingface":
      return peers.outputs_of_huggingface(theirs, family, images, tokens, mask)
    return peers.outputs_of_open_clip(theirs, images, tokens)

  spec = f"{library}:{folder / 'back'}"
  exports.write(spec, model.config, model.params, model.tokenizer, resolution=model.views.resolution)
  returned = peers.opened(library, folder / "back")
  before, after = reference.state_dict(), returned.state_dict()
  same = before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
  cells = [differences(ours, outputs(theirs)) for theirs in (reference, returned)]
  print(f"{library + ' ' + family:24}{cells[0]:>34}{cells[1]:>34}{'same bits' if same else 'differs':>16}", flush=True)


def differences(ours, theirs) -> str:
  """Of each part."""
  values = [np.abs(one - other).max() for one, other in zip(ours, theirs, strict=True)]
  values[2] /= np.abs(theirs[2]).max()
  return "  ".join(f"{value:.1e}" for value in values)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  app.run(main)
