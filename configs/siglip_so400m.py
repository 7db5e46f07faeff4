"""SigLIP So400m/14 at 384 px, as released (arXiv 2303.15343), at the paper's batch of 32,768."""

from ml_collections import ConfigDict

from configs import common, siglip_b16


def get_config() -> ConfigDict:
  config = siglip_b16.get_config()
  config.name = "siglip_so400m"
  config.model = common.model("siglip_so400m14_384")
  config.mesh.fsdp = 8
  config.accumulation = 4  # 729 patches an image: 32 pairs at a time on a v5e.
  return config
