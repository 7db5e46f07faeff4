"""What configs of older versions called otherwise, or did not have yet.

A config that is written carries the number of its form; `config` brings older ones to today's. `training.upgrades` does
the same for the arrays of checkpoints.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from contrastive_jax.errors import UserError

_KEY = "version"

Config = dict[str, Any]


def _named_towers(config: Config) -> None:
  """The image tower was `model.vision`, and some fields did not exist: what their runs did is written here."""
  if "model" in config:
    config["model"] = overrides(config["model"])
  if "total_steps" not in config:
    return  # Imported weights have a model alone.
  for name, value in (("init_model", "auto"), ("max_skipped_steps", 10)):
    config.setdefault(name, value)
  config.setdefault("schedule", {}).setdefault("on_growth", "hold")
  config.setdefault("data", {}).setdefault("max_bad_share", 0.1)


def _other_towers(config: Config) -> None:
  """There were no towers beside those of images and texts."""
  if "total_steps" in config:
    config.get("model", {}).setdefault("others", [])


# Views that no term read: what `data.augment.STRONG` and `data.text_augment.TextAugment` are.
_UNUSED_VIEWS: Config = {
  "strong_augment": {
    **{"zoom": [1.0, 3.5], "stretch": 0.288, "flip": 0.5, "colour": 0.8, "hue": 36.0, "brightness": 51.0},
    **{"saturation": [0.6, 1.4], "contrast": [0.6, 1.4], "grey": 0.2, "blur": 0.5},
    **dict.fromkeys(("rotate", "shear", "shift", "background", "outline", "flatten", "unfill"), 0.0),
  },
  "text_augment": {"stop_words": 0.8, "swap": 0.4, "delete": 0.2, "insert": 0.0, "share": 0.1},
}


def _own_pairs(config: Config) -> None:
  """Every image made one pair, long captions were cut, and all files were on the machine of the run."""
  if "total_steps" in config:
    config.setdefault("workdir_mirror", "")
    config.get("model", {}).setdefault("text", {}).setdefault("tap", 0)
    for name, value in copy.deepcopy(_UNUSED_VIEWS).items():
      config["data"].setdefault(name, value)
    for name, value in (
      ("long_captions", "truncate"),
      ("swap_words", False),
      ("clusters", ""),
      ("captions_per_image", 1),
      ("cache_bytes", 0),
      ("cache_dir", ""),
    ):
      config["data"].setdefault(name, value)
    config.get("distillation", {}).setdefault("replay", [])
    for stage in config.get("curriculum", ()):
      stage.setdefault("weights", {})


def _fewer_tokens(config: Config) -> None:
  """Every step read all patches of its images, and captions of one length, and blocks ran in a loop over depth."""
  if "total_steps" in config:
    for tower in ("image", "text"):
      blocks = config.get("model", {}).get(tower, {}).get("transformer", {})
      blocks.setdefault("unroll", 1)
      blocks.setdefault("attention_kernel", False)
    config["data"].setdefault("drop_patches", 0.0)
    for stage in config.get("curriculum", ()):
      for name, value in (("drop_patches", None), ("text_length", 0), ("text_rows", 0), ("text_row_length", 0)):
        stage.setdefault(name, value)


# Each brings a config to the form after its own; their number is that of today's form.
_STEPS: tuple[Callable[[Config], None], ...] = (_named_towers, _other_towers, _own_pairs, _fewer_tokens)
VERSION = len(_STEPS)


def stamped(config: Mapping[str, Any]) -> Config:
  """Returns a config of today's form with its number, as it is written."""
  return {_KEY: VERSION, **config}


def config(content: Mapping[str, Any], source: str) -> Config:
  """Returns a config that any version has written in today's form, without the number of its own.

  Args:
    content: what was written; the first versions gave no number.
    source: the file or checkpoint that it was read from, for errors.

  Raises:
    UserError: if a newer version wrote it.
  """
  upgraded = copy.deepcopy(dict(content))
  version = upgraded.pop(_KEY, 0)
  if not isinstance(version, int) or version > VERSION:
    raise UserError(f"{source} was written by a newer version ({version=}; this one reads up to {VERSION}): update")
  # What is no config at all is for those to say who know its fields.
  if all(isinstance(upgraded.get(part, {}), dict) for part in ("model", "schedule", "data")):
    for step in _STEPS[version:]:
      step(upgraded)
  return upgraded


def overrides(model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns overrides of a model's fields under today's names, as config files of older versions give them."""
  return {tower(name): value for name, value in model.items()}


def tower(name: str) -> str:
  """Returns today's name of a tower, and any other name as it is."""
  return "image" if name == "vision" else name
