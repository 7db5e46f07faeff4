"""Starting a run from another run or from imported weights, whole or by tower."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from contrastive_jax.errors import UserError
from contrastive_jax.training.checkpoint import restore_params
from contrastive_jax.training.state import StateSpec, TrainState


def initial_state(spec: StateSpec, *, seed: int, init_from: str = "", towers: str = "all") -> TrainState:
  """A new state, with weights taken from elsewhere where asked.

  Args:
    spec: of the state.
    seed: of the parameters that are not taken.
    init_from: a run directory; empty takes nothing.
    towers: "all", or "image" or "text" for one tower without logit scale and bias.

  Raises:
    UserError: naming every parameter that is missing there, unexpected here, or of another shape.
  """
  state = spec.create(seed)
  if not init_from:
    return state
  params = _taken(init_from, towers, state.params)
  average = state.average
  if average is not None:
    flat = traverse_util.flatten_dict(params)
    # Copies: a donated state must not hold the same buffer twice.
    averaged = {path: jnp.array(flat[path]) for path in traverse_util.flatten_dict(average)}
    average = traverse_util.unflatten_dict(averaged)
  return dataclasses.replace(state, params=params, average=average)


def _taken(init_from: str, towers: str, params: dict[str, Any]) -> dict[str, Any]:
  theirs = traverse_util.flatten_dict(restore_params(Path(init_from), None).params)
  ours = traverse_util.flatten_dict(params)
  wanted = {path for path in ours if towers in ("all", path[0])}
  offered = {path for path in theirs if towers in ("all", path[0])}
  misfits = [f"{'/'.join(path)} is missing there" for path in sorted(wanted - offered)]
  misfits += [f"{'/'.join(path)} is unknown here" for path in sorted(offered - wanted)]
  misfits += [
    f"{'/'.join(path)} is {list(theirs[path].shape)} there and {list(ours[path].shape)} here"
    for path in sorted(wanted & offered)
    if theirs[path].shape != ours[path].shape
  ]
  if misfits:
    raise UserError(f"init_from={init_from} does not fit the model: {'; '.join(misfits)}")
  taken = {path: jax.device_put(theirs[path], ours[path].sharding) for path in wanted}
  return traverse_util.unflatten_dict({**ours, **taken})
