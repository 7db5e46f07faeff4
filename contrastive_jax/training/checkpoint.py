"""Orbax checkpoints: asynchronous, sharded, atomic, verified when read back.

Orbax's `experimental.v1` interface is used here and nowhere else.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.parallel import distributed
from contrastive_jax.training.state import TrainState, towers

log = logging.getLogger(__name__)

paths.read_names_literally()


def checksum(state: Any) -> dict[str, int]:
  """A number for each leaf that changes with any of its bits but not with how the leaf is sharded.

  The sum of the bits, read as unsigned integers modulo 2^32. Integer addition is associative, so every mesh agrees.
  """

  def add(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    width = jnp.dtype(leaf.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(width, 4)}"))
    return jnp.sum(bits.astype(jnp.uint32))

  sums = jax.jit(lambda tree: jax.tree.map(add, tree))(state)
  paths = jax.tree_util.tree_leaves_with_path(jax.device_get(sums))
  return {jax.tree_util.keystr(path): int(value) for path, value in paths}


def _as_dict(state: TrainState) -> dict[str, Any]:
  """What is written: no class of ours, so that checkpoints outlive the code. Absent parts are left out."""
  tree = {"step": state.step, "params": state.params, "slots": state.slots, "average": state.average}
  return {name: part for name, part in tree.items() if part is not None}


def has_checkpoint(workdir: Path) -> bool:
  """Whether a run has a complete checkpoint, found without reading any."""
  folder = workdir / "checkpoints"
  return folder.is_dir() and any(entry.name.isdigit() and entry.is_dir() for entry in folder.iterdir())


class Checkpoints:
  """The checkpoints of one run, `<directory>/<step>`."""

  def __init__(self, directory: Path, *, keep_last: int = 3, keep_every: int = 0):
    """Opens a directory.

    Args:
      directory: created when the first checkpoint is written.
      keep_last: newest checkpoints that are kept.
      keep_every: checkpoints at multiples of this step are kept for ever; 0 keeps none of them.
    """
    self._directory = directory.absolute()
    self._keep_last = keep_last
    self._keep_every = keep_every
    if distributed.is_main():
      # What a killed process left half written. Orbax would do it in a thread that outlives a quick exit.
      for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished)
    distributed.barrier("open checkpoints")
    self._open()

  def _open(self) -> None:
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(self._keep_last)]
    if self._keep_every:
      kept.append(policies.EveryNSteps(self._keep_every))
    self._manager = ocp.training.Checkpointer(
      self._directory,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=policies.AnyPreservationPolicy(kept),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return [found.step for found in self._manager.checkpoints]

  def save(self, state: TrainState, about: Mapping[str, Any]) -> None:
    """Starts writing; waits only for the checkpoint before this one.

    Args:
      state: may be donated as soon as this returns.
      about: JSON that is needed to continue: segments, tokenizer fingerprint.
    """
    tree = _as_dict(state)
    about = {**about, "checksum": checksum(tree)}
    self._manager.save_checkpointables_async(int(state.step), {"state": tree}, custom_metadata=about)

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait()

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read and whose checksum holds, or None.

    A damaged checkpoint is reported, moved aside to `<step>.damaged` and the one before it is used.

    Args:
      abstract: shapes, dtypes and shardings to restore into; the mesh may differ from the one that wrote.

    Raises:
      UserError: if there are checkpoints but all are damaged.
    """
    tree = _as_dict(abstract)
    damaged: dict[int, str] = {}
    for step in reversed(self.steps):
      try:
        about = dict(self._manager.checkpointables_metadata(step).custom_metadata)
        restored = self._manager.load_checkpointables(step, {"state": tree})["state"]
      except Exception as error:  # Orbax, TensorStore, JSON and the file system each have their own.
        damaged[step] = f"{type(error).__name__}: {str(error)[:120]}"
        continue
      found, expected = checksum(restored), about.pop("checksum")
      wrong = [name for name in expected if found.get(name) != expected[name]]
      if wrong:
        damaged[step] = f"the checksum of {wrong[0]} and {len(wrong) - 1} more differs"
        continue
      for bad, why in damaged.items():
        log.warning("Checkpoint %d is damaged (%s); going on from checkpoint %d.", bad, why, step)
        self._set_aside(bad)
      return TrainState(**{"average": None, **restored}), about
    if damaged:
      step, why = next(iter(damaged.items()))
      raise UserError(f"{self._directory} has no checkpoint that can be read; the newest, {step}, says: {why}")
    return None

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    if distributed.is_main():
      source = self._directory / str(step)
      target, copy = source.with_name(f"{step}.damaged"), 1
      while target.exists():
        copy += 1
        target = source.with_name(f"{step}.damaged-{copy}")
      source.rename(target)
    distributed.barrier(f"set aside {step}")
    self._open()


class Restored(NamedTuple):
  """Parameters from a checkpoint, the number of updates they had, and what the checkpoint holds beside its state."""

  params: dict[str, Any]
  step: int
  about: dict[str, Any]


def restore_params(workdir: Path, step: int | None, place: Callable[[Any], Any] | None = None) -> Restored:
  """The dual encoder as evaluation uses it: the moving average where one was kept, no slots, no projections.

  Args:
    workdir: a run.
    step: which checkpoint; None is the newest.
    place: maps the abstract parameters to the same with shardings; None puts them on the first device.

  Raises:
    UserError: if the run has no such checkpoint.
  """
  directory = (Path(workdir) / "checkpoints").absolute()
  if not directory.is_dir():
    raise UserError(f"{workdir} has no checkpoints: train a model there first, or name another run")
  with ocp.training.Checkpointer(directory) as manager:
    steps = [found.step for found in manager.checkpoints]
    if not steps or (step is not None and step not in steps):
      wanted = "no finished checkpoint" if not steps else f"no checkpoint of step {step}; it has {steps}"
      raise UserError(f"{workdir} has {wanted}")
    step = steps[-1] if step is None else step
    metadata = manager.checkpointables_metadata(step)
    described = metadata.metadata["state"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), described)
    skipped = jax.tree.map(lambda _: ocp.PLACEHOLDER, shapes)
    wanted = {name: towers(shapes[name]) for name in ("params", "average") if name in shapes}
    if place is not None:
      wanted = {name: place(part) for name, part in wanted.items()}
    loaded = manager.load_checkpointables(step, {"state": _overlay(skipped, wanted)})["state"]
  params = _overlay(towers(loaded["params"]), towers(loaded.get("average", {})))
  return Restored(params, step, dict(metadata.custom_metadata))


def _overlay(base: Any, over: Any) -> Any:
  if not isinstance(base, Mapping):
    return over
  return {name: _overlay(value, over[name]) if name in over else value for name, value in base.items()}
