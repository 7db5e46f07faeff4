"""CLIP L/14 at 224 px (arXiv 2103.00020) at the paper's batch of 32,768."""

from ml_collections import ConfigDict

from configs import clip_b32, common


def get_config() -> ConfigDict:
  config = clip_b32.get_config()
  config.name = "clip_l14"
  config.model = common.model("clip_l14")
  config.optimizer.learning_rate = 4e-4
  config.mesh.fsdp = 8
  return config
