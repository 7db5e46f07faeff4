"""Zero-shot evaluation next to a plain loop over `transformers` with the same weights, on the same pictures.

  python -m benchmarks.evaluation                              # CLIP B/32 with random weights, 256 pictures
  python -m benchmarks.evaluation --workdir=runs/emoji_clip    # a trained run, the drawings of emoji_openmoji

The weights are exported and opened by `transformers`. Each side decodes, resizes, embeds and compares, batch by batch;
compilation is not timed. The two take turns; figures are medians. With a run it also prints the accuracy of both.
"""

import functools
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks.timing import taking_turns
from contrastive_jax import load
from contrastive_jax.evaluation.zero_shot import classifier
from contrastive_jax.inference import Model
from contrastive_jax.interop import exports, tokenizer_files
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.preprocess.images import decode
from contrastive_jax.preprocess.views import squared
from data import tasks

_WORKDIR = flags.DEFINE_string("workdir", "", "A run whose architecture transformers has.")
_PRESET = flags.DEFINE_string("preset", "clip_b32", "Random weights, where there is no run.")
_IMAGES = flags.DEFINE_integer("images", 256, "Pictures, where there is no run.")
_BATCH = flags.DEFINE_integer("batch", 64, "Pictures encoded at once, on both sides.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed passes of each.")


class Transformers:
  """The same model as its users write it down: processor, model, batch by batch."""

  def __init__(self, folder: Path):
    import transformers

    from benchmarks.reference_models import torch  # Before what imports torchvision, see there.

    self._torch = torch
    self._processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._model = transformers.AutoModel.from_pretrained(folder).eval()

  def encode_image(self, images: list[np.ndarray]) -> np.ndarray:
    """Unit vectors."""
    rows = []
    with self._torch.inference_mode():
      for start in range(0, len(images), _BATCH.value):
        given = self._processor(images[start : start + _BATCH.value], return_tensors="pt")
        rows.append(self._unit(self._model.get_image_features(**given)))
    return np.concatenate(rows)

  def encode_text(self, texts: list[str]) -> np.ndarray:
    """Unit vectors."""
    rows = []
    with self._torch.inference_mode():
      for start in range(0, len(texts), _BATCH.value):
        some = list(texts[start : start + _BATCH.value])
        given = self._tokenizer(some, padding="max_length", truncation=True, return_tensors="pt")
        rows.append(self._unit(self._model.get_text_features(given["input_ids"], given["attention_mask"])))
    return np.concatenate(rows)

  def _unit(self, output) -> np.ndarray:
    features = getattr(output, "pooler_output", output)
    return self._torch.nn.functional.normalize(features, dim=-1).numpy()


def random_model() -> Model:
  """Returns the preset with random weights and CLIP's tokenizer."""
  config = presets.resolve(_PRESET.value)
  params = jax.jit(dual_encoder.init, static_argnums=0)(config, jax.random.key(0))
  return Model(config, params, tokenizer_files.clip(), batch_size=_BATCH.value)


def main(_) -> None:
  ours = load(_WORKDIR.value, batch_size=_BATCH.value) if _WORKDIR.value else random_model()
  scored = tasks.load("emoji_openmoji") if _WORKDIR.value else None
  if scored is None:
    images = list(np.random.default_rng(0).integers(0, 256, (_IMAGES.value, 256, 320, 3), np.uint8))
  else:
    images = [squared(decode(scored.images[row])) for row in range(len(scored.images))]
  with tempfile.TemporaryDirectory() as folder:
    spec = f"huggingface:{folder}/exported"
    exports.write(spec, ours.config, ours.params, ours.tokenizer, resolution=ours.views.resolution)
    theirs = Transformers(Path(folder) / "exported")
  embed = [functools.partial(model.encode_image, images) for model in (ours, theirs)]
  seconds = taking_turns(embed, _REPEATS.value)[..., 0]
  for name, taken in zip(("ours", "transformers"), np.median(seconds, axis=1), strict=True):
    print(f"{name:13} {len(images) / taken:8.1f} images/s")
  print(f"ours over transformers: {np.median(seconds[1] / seconds[0]):.2f}x, {os.cpu_count()} CPU cores")
  difference = np.abs(ours.encode_image(images) - theirs.encode_image(images)).max()
  print(f"largest difference of an embedding's entry: {difference:.1e}")
  if scored is not None:
    guesses = [
      np.argmax(model.encode_image(images) @ np.asarray(classifier(model, scored.classes, scored.templates)).T, axis=1)
      for model in (ours, theirs)
    ]
    for name, guessed in zip(("ours", "transformers"), guesses, strict=True):
      print(f"{name:13} {np.mean(guessed == scored.labels):.4%} of {len(images):,} right")
    print(f"{np.sum(guesses[0] != guesses[1])} guesses differ")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  app.run(main)
