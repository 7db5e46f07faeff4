"""UniViTAR 1b; see configs/univitar.py."""

from ml_collections import ConfigDict

from configs import univitar


def get_config() -> ConfigDict:
  return univitar.config_of("univitar_1b", pack_pairs=8, accumulation=16)
