"""SigLIP L/16 at 256 px, as released (arXiv 2303.15343), at the paper's batch of 32,768."""

from ml_collections import ConfigDict

from configs import common, siglip_b16


def get_config() -> ConfigDict:
  config = siglip_b16.get_config()
  config.name = "siglip_l16"
  config.model = common.model("siglip_l16", image={"image_size": 256})
  config.mesh.fsdp = 8
  return config
