"""Every TFDS set that a shipped config trains on has the features that the config names: by TFDS's own description."""

import importlib.util
import pathlib

import pytest
import tensorflow_datasets as tfds

from contrastive_jax.schedule.stages import segments_of
from data.sources.features import holds_pictures, holds_text
from tests.data.test_benchmarks import structure

CONFIGS = sorted(
  path
  for path in pathlib.Path("configs").glob("*.py")
  if path.stem != "common" and "def get_config()" in path.read_text()
)


def config_of(path):
  spec = importlib.util.spec_from_file_location(f"shipped_{path.stem.replace('.', '_')}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_features_are_there(path):
  config = config_of(path)
  names = {name for segment in segments_of(config) for name in segment.all_sources()}
  for name in sorted(name.removeprefix("tfds/") for name in names if name.startswith("tfds/")):
    features = structure({"coco_captions": "coco_captions/2014"}.get(name, name))
    assert holds_pictures(features[config.data.image_key], tfds.features), (name, config.data.image_key)
    caption = features[config.data.caption_key]
    assert holds_text(caption) or getattr(caption, "names", None), (name, config.data.caption_key)
