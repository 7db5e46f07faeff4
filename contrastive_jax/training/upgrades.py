"""What older versions wrote into checkpoints under other names."""

from typing import Any

import jax

from contrastive_jax.training.state import OBJECTIVE

# What the terms of the objective learn, until they were named after it; so too in the optimiser's state.
_PROJECTIONS = "projections"
# The optimiser's state, which had a name of ours.
_SLOTS, _OPT_STATE = "slots", "opt_state"


def old_names(state: Any, stored: Any) -> Any:
  """Returns the state to restore into, with the names of the checkpoint it is restored from.

  Args:
    state: nested dicts, and the optimiser's tuples, with today's names.
    stored: nested dicts of what the checkpoint says that it holds.
  """
  if _PROJECTIONS in stored.get("params", {}):
    state = _renamed_below(state, OBJECTIVE, _PROJECTIONS)
  return _renamed(state, _OPT_STATE, _SLOTS) if _SLOTS in stored else state


def new_names(restored: Any) -> Any:
  """Undoes `old_names`."""
  return _renamed_below(_renamed(restored, _SLOTS, _OPT_STATE), _PROJECTIONS, OBJECTIVE)


def _renamed(node: dict[str, Any], old: str, new: str) -> dict[str, Any]:
  return {new if name == old else name: part for name, part in node.items()}


def _renamed_below(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
  """Renames an entry of every dictionary in the parts that follow the parameters' tree."""

  def is_named(node):
    return isinstance(node, dict) and old in node

  def rename(node):
    return _renamed(node, old, new) if is_named(node) else node

  named = {name: state[name] for name in ("params", _OPT_STATE, "average") if name in state}
  return {**state, **jax.tree.map(rename, named, is_leaf=is_named)}
