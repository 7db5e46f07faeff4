"""CLIP B/16 at 224 px (arXiv 2103.00020) at the paper's batch of 32,768."""

from ml_collections import ConfigDict

from configs import clip_b32, common


def get_config() -> ConfigDict:
  config = clip_b32.get_config()
  config.name = "clip_b16"
  config.model = common.model("clip_b16")
  return config
