"""What older versions wrote under other names."""

from typing import Any

import jax

from contrastive_jax.training.state import OBJECTIVE

# What the terms of the objective learn, until they were named after it; so too in the optimiser's state.
_PROJECTIONS = "projections"


def old_names(state: Any, stored: Any) -> Any:
  """The state to restore into, with the names of the checkpoint it is restored from.

  Args:
    state: nested dicts, and the optimiser's tuples, with today's names.
    stored: what the checkpoint says that it holds.
  """
  old = _PROJECTIONS in stored.get("params", {})
  return _renamed(state, OBJECTIVE, _PROJECTIONS) if old else state


def new_names(restored: Any) -> Any:
  """Undoes `old_names`."""
  return _renamed(restored, _PROJECTIONS, OBJECTIVE)


def _renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
  def is_named(node):
    return isinstance(node, dict) and old in node

  def rename(node):
    return {new if name == old else name: part for name, part in node.items()} if is_named(node) else node

  named = {name: state[name] for name in ("params", "slots", "average") if name in state}
  return {**state, **jax.tree.map(rename, named, is_leaf=is_named)}
