"""UniViTAR 0.3b; see configs/univitar.py."""

from ml_collections import ConfigDict

from configs import univitar


def get_config() -> ConfigDict:
  return univitar.config_of("univitar_0.3b", pack_pairs=8, accumulation=16)
