import jax
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder, presets


@pytest.mark.parametrize(
  ("preset", "count"),
  [
    ("clip_b32", 151_277_313),
    ("clip_b16", 149_620_737),
    ("clip_l14", 427_616_513),
    ("siglip_b16", 203_155_970),
    ("siglip_so400m14_384", 877_960_498),
  ],
)
def test_parameter_counts_are_those_of_the_released_models(preset, count):
  _, params = dual_encoder.abstract(presets.resolve(preset))
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(("size", "millions"), [("0.3b", 309.9), ("0.6b", 636.6), ("1b", 1418.8)])
def test_univitar_has_the_published_number_of_parameters(size, millions):
  """Of blocks and patch embedding: the released tower ends there."""
  _, params = dual_encoder.abstract(presets.resolve(f"univitar_{size}"))
  parts = params["image"]["transformer"], params["image"]["patch_embedding"]
  assert round(sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parts)) / 1e6, 1) == millions


@pytest.mark.parametrize("flavour", ["clip", "siglip"])
def test_every_size_has_a_preset_of_either_flavour(flavour):
  vision = {
    (transformer.width, transformer.depth, transformer.heads, transformer.mlp_dim)
    for name, config in presets.PRESETS.items()
    if name.startswith(flavour) and (transformer := config.image.transformer)
  }
  assert vision == set(presets.SIZES.values())


def test_overrides_replace_only_what_they_name():
  config = presets.resolve("clip_b32", {"image": {"image_size": 64, "mean": [0, 0, 0]}, "init_logit_scale": 1})
  assert (config.image.image_size, config.image.patch_size, config.image.grid) == (64, 32, 2)
  assert config.image.mean == (0.0, 0.0, 0.0)
  assert config.init_logit_scale == 1.0 and isinstance(config.init_logit_scale, float)
  assert config.text == presets.PRESETS["clip_b32"].text


@pytest.mark.parametrize(
  ("preset", "overrides", "parts"),
  [
    ("clip_b23", {}, ["preset='clip_b23'", "did you mean 'clip_b", "siglip_b16"]),
    ("clip_b32", {"image": {"image_sise": 64}}, ["model.image.image_sise", "did you mean 'image_size'?"]),
    ("clip_b32", {"image": {"transformer": {"width": 100}}}, ["heads=12", "width=100"]),
    ("clip_b32", {"image": {"transformer": {"activation": "gleu"}}}, ["'gleu'", "did you mean 'gelu'?"]),
    ("clip_b32", {"image": {"image_size": "64"}}, ["model.image.image_size='64'", "type int"]),
    ("clip_b32", {"image": 3}, ["model.image=3", "mapping"]),
    ("clip_b32", {"image": {"class_token": False}}, ["image.pool='cls'", "class_token"]),
    ("clip_b32", {"image": {"mean": [0.5]}}, ["image.mean=(0.5,)", "3 values"]),
    ("clip_b32", {"text": {"transformer": {"rope": "2d"}}}, ["text.transformer.rope", "None"]),
    ("clip_b32", {"image": {"tubelet": 0}}, ["image.tubelet=0", "at least 1"]),
    ("clip_b32", {"image": {"time_position": "rotary"}}, ["image.time_position='rotary'", "learned"]),
    (
      "univitar_0.3b",
      {"image": {"transformer": {"rope": "3d", "heads": 128}}},
      ["rope='3d'", "16 features per head", "1024/128=8"],
    ),
    ("siglip_b16", {"embed_dim": 64}, ["image.transformer.width=768", "embed_dim=64"]),
    ("siglip_b16", {"dtype": "float16"}, ["model.dtype='float16'", "bfloat16"]),
    ("siglip_b16", {"image": {"transformer": {"drop_path": 1.0}}}, ["drop_path=1.0", "[0, 1)"]),
  ],
)
def test_mistakes_are_named_in_one_sentence(preset, overrides, parts):
  with pytest.raises(UserError) as error:
    presets.resolve(preset, overrides)
  message = str(error.value)
  assert "\n" not in message
  assert all(part in message for part in parts), message
