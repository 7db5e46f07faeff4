"""Starts a run from another run or from imported weights, whole or by tower."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from contrastive_jax import paths
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models import presets, resizing
from contrastive_jax.models.config import ImageConfig
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.training.checkpoint import has_checkpoint, restore_params
from contrastive_jax.training.fields import checked_config
from contrastive_jax.training.state import OBJECTIVE, StateSpec, TrainState

Parameters = dict[tuple[str, ...], Any]
# Where a run's model comes from: "init_from" takes that of the weights it starts from, "config" keeps `model`, and
# "auto" takes theirs where `model` is as configs/common.py has it.
MODELS = ("auto", "init_from", "config")
DEFAULT_PRESET = "siglip_b16"
# Misfits that an error lists.
_LISTED = 8


def check_choices(config: ConfigDict) -> None:
  """Raises a `UserError` for an unknown `init_model` or `init_towers`."""
  require_known("init_model", config.init_model, MODELS)
  require_known("init_towers", config.init_towers, ("all", "image", "text"))


def with_initial_model(
  config: ConfigDict, workdir: Path | None = None, say: Callable[[str], None] = lambda sentence: None
) -> Any:
  """Returns the config with the model that `init_from` brings, or the config itself where it brings none.

  Args:
    config: the config of the run.
    workdir: the run directory; once there is a checkpoint, the model is the one that it was started with.
    say: is told in a sentence what was taken.

  Raises:
    UserError: if `init_model` is unknown or `init_from` is not a run.
  """
  check_choices(config)
  if not config.init_from or config.init_model == "config":
    return config
  resumed = workdir is not None and has_checkpoint(workdir)
  source = workdir if resumed else paths.run_to_read("init_from", config.init_from)
  ours, theirs = (dataclasses.asdict(presets.model_config(content)) for content in (config, checked_config(source)))
  default = dataclasses.asdict(presets.resolve(DEFAULT_PRESET))
  towers = {"all": ("image", "text"), "image": ("image",), "text": ("text",)}[config.init_towers]
  kept = ("image", "text", "others", "dtype")
  rest = [name for name in ours if name not in kept] if len(towers) > 1 else ["embed_dim"]
  untouched = {name for name in ours if ours[name] == default[name]}
  if config.init_model == "auto":
    if not untouched.issuperset(towers):
      return config
    rest = [name for name in rest if name in untouched]
  taken = {name: theirs[name] for name in (*towers, *rest)}
  if all(ours[name] == value for name, value in taken.items()):
    return config
  changed = copy.deepcopy(config)
  with changed.unlocked():
    model = changed.model.to_dict() | taken
    del changed.model
    changed.model = ConfigDict(model)
  if not resumed:
    what = "The model is" if len(towers) > 1 else f"The {config.init_towers} tower is"
    say(f"{what} that of init_from={config.init_from}; init_model='config' keeps the one of the config.")
  return changed


def initial_state(
  spec: StateSpec, *, seed: int, init_from: str = "", towers: str = "all", say: Callable[[str], None] = print
) -> TrainState:
  """Makes a new state, with weights taken from elsewhere where asked.

  Args:
    spec: the specification of the state.
    seed: seed of the parameters that are not taken.
    init_from: a run directory; empty takes nothing.
    towers: "all", or "image" or "text" for one tower without logit scale and bias.
    say: is told in a sentence of each parameter that had to be adapted: those of an image tower of another patch size,
      tubelet or grid, see `models.resizing`, and positions of captions longer than ours; and of each of the towers
      beside images and texts that the weights lack.

  Raises:
    UserError: naming every parameter that is missing there, unexpected here, or of another shape; or if the tokenizer
      there is not that of its checkpoint.
  """
  state = spec.create(seed)
  if not init_from:
    return state
  found = restore_params(Path(init_from), None)
  stored, expected = Path(init_from) / "tokenizer", found.metadata.get("tokenizer")
  if towers != "image" and expected and stored.is_dir() and tokenizers.load(stored).fingerprint != expected:
    raise UserError(f"{stored} is not the tokenizer that the checkpoint was trained with: put the original back")
  restored = traverse_util.flatten_dict(found.params)
  theirs, sentences = _adapted(restored, Path(init_from), spec.model.image) if towers != "text" else (restored, [])
  if towers != "image":
    theirs, cut = _cut(theirs, init_from, spec.model.text.length)
    sentences += cut
  new = [other.name for other in spec.model.others if other.name not in found.params] if towers == "all" else []
  sentences += [f"The {name} tower begins anew, since {init_from} has none." for name in new]
  params = _taken(theirs, init_from, towers, state.params, (*new, OBJECTIVE))
  for sentence in sentences:
    say(sentence)
  average = state.average
  if average is not None:
    flat = traverse_util.flatten_dict(params)
    # Copies: a donated state must not hold the same buffer twice.
    averaged = {path: jnp.array(flat[path]) for path in traverse_util.flatten_dict(average)}
    average = traverse_util.unflatten_dict(averaged)
  return dataclasses.replace(state, params=params, average=average)


def _taken(
  theirs: Parameters, init_from: str, towers: str, params: dict[str, Any], new: tuple[str, ...]
) -> dict[str, Any]:
  """Returns our parameters with theirs in their place, where `towers` says so; the parts named `new` begin anew."""
  ours = traverse_util.flatten_dict(params)
  wanted = {path for path in ours if towers in ("all", path[0]) and path[0] not in new}
  offered = {path for path in theirs if towers in ("all", path[0])}
  misfits = [f"{'/'.join(path)} is missing there" for path in sorted(wanted - offered)]
  misfits += [f"{'/'.join(path)} is unknown here" for path in sorted(offered - wanted)]
  misfits += [
    f"{'/'.join(path)} is {list(theirs[path].shape)} there and {list(ours[path].shape)} here"
    for path in sorted(wanted & offered)
    if theirs[path].shape != ours[path].shape
  ]
  if misfits:
    more = f"; and {len(misfits) - _LISTED} more" if len(misfits) > _LISTED else ""
    raise UserError(
      f"init_from={init_from} does not fit the model: {'; '.join(misfits[:_LISTED])}{more}; to take its model as well,"
      " set init_model='init_from'"
    )
  taken = {path: jax.device_put(theirs[path], ours[path].sharding) for path in wanted}
  return traverse_util.unflatten_dict({**ours, **taken})


def _adapted(theirs: Parameters, init_from: Path, image: ImageConfig) -> tuple[Parameters, list[str]]:
  """Resizes their parameters that depend on sizes of patches, clips and grids; returns them and what was done."""
  old = presets.model_config(checked_config(init_from)).image
  if old.channels != image.channels:
    return theirs, []
  adapted, sentences = dict(theirs), []
  kernel, position = ("image", "patch_embedding", "kernel"), ("image", "position")
  if kernel in theirs and (old.patch_size, old.tubelet) != (image.patch_size, image.tubelet):
    adapted[kernel] = resizing.patch_kernel(np.asarray(theirs[kernel]), old, image)
    sentences.append(f"Adapted the patch embedding of {init_from} from {_patch(old)} to {_patch(image)}.")
  if position in theirs and old.grid != image.grid and old.class_token == image.class_token:
    adapted[position] = resizing.position_table(np.asarray(theirs[position]), old, image)
    sentences.append(
      f"Resized the position table of {init_from} from {old.grid}x{old.grid} to {image.grid}x{image.grid} patches."
    )
  return adapted, sentences


def _cut(theirs: Parameters, init_from: str, length: int) -> tuple[Parameters, list[str]]:
  """Drops the positions that our captions never reach from their parameters; returns them and what was done."""
  table = theirs.get(("text", "position"))
  if table is None or len(table) <= length:
    return theirs, []
  return {**theirs, ("text", "position"): table[:length]}, [
    f"Took the first {length} of the {len(table)} text positions of {init_from}."
  ]


def _patch(image: ImageConfig) -> str:
  frames = f", {image.tubelet} frames" if image.tubelet > 1 else ""
  return f"{image.patch_size} px{frames}"
