"""The table of towers beside those of images and texts: the name that a config gives each, and its fields."""

from contrastive_jax.models.config import OtherConfig

# An entry of `model.others` names one of these. None is shipped: docs/add_a_tower.md shows what adding one takes.
OTHERS: dict[str, type[OtherConfig]] = {}
