"""Orbax checkpoints: asynchronous, sharded, atomic, verified when read back.

Orbax's `experimental.v1` interface is used here and in `verification` alone.
"""

import contextlib
import functools
import json
import logging
import numbers
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import orbax.checkpoint.experimental.v1 as ocp

from contrastive_jax import paths, runs
from contrastive_jax.errors import NonFiniteError, SaveError, UserError
from contrastive_jax.parallel import distributed
from contrastive_jax.training import orbax_patches, upgrades
from contrastive_jax.training.state import TrainState, towers
from contrastive_jax.training.verification import Damaged, checksum, plain_name, verified

log = logging.getLogger(__name__)

# Between looks of several processes at whether all have written their part of a checkpoint.
_POLL_SECONDS = 0.1

paths.read_names_literally()
orbax_patches.apply()


def _as_dict(state: TrainState) -> dict[str, Any]:
  """Returns a state as it is written, without its absent parts: no class of ours, so that it outlives the code."""
  tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state, "average": state.average}
  tree["objective"] = state.objective
  return {name: part for name, part in tree.items() if part is not None}


def finished_steps(folder: Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, ascending, without reading any."""
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def has_checkpoint(workdir: Path) -> bool:
  """Says whether a run has a complete checkpoint, without reading any."""
  return bool(finished_steps(workdir / "checkpoints"))


class Checkpoints:
  """The checkpoints of one run, `<directory>/<step>`."""

  def __init__(
    self,
    directory: Path,
    *,
    keep_last: int = 3,
    keep_every: int = 0,
    each_written: Callable[[], object] = lambda: None,
  ):
    """Opens a directory.

    Args:
      directory: the directory, which is created when the first checkpoint is written.
      keep_last: number of the newest checkpoints that are kept.
      keep_every: the number of steps at whose multiples checkpoints are kept for ever; 0 keeps none of them.
      each_written: is called whenever it is known that a checkpoint of this object is on disk.
    """
    self._directory = directory.absolute()
    self._keep_last = keep_last
    self._keep_every = keep_every
    self._saving: int | None = None
    self._failed = False
    self._when_written: Callable[[], object] | None = None
    self._each_written = each_written
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

  def __exit__(self, kind: Any, *_) -> None:
    if self._failed and distributed.is_several():
      return  # It would wait for the other processes, which end as well.
    try:
      self._manager.close()
    except Exception:
      # What ended the block says more than that its last save failed as well.
      if kind is None:
        raise

  @property
  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, ascending."""
    return [found.step for found in self._manager.checkpoints]

  def save(self, state: TrainState, metadata: Mapping[str, Any]) -> None:
    """Starts writing; waits only for the checkpoint before this one. A failure after it returned is told by `poll`.

    Args:
      state: may be donated as soon as this returns.
      metadata: JSON that is needed to continue: segments, tokenizer fingerprint.

    Raises:
      NonFiniteError: if a leaf is not finite; nothing is written then.
      SaveError: if this or the checkpoint before it cannot be written.
    """
    self.wait()  # What failed has its own step in the message, and no second one is begun on a full disk.
    tree, step = _as_dict(state), int(state.step)
    sums, not_finite = checksum(tree)
    if not_finite:
      raise NonFiniteError(
        f"step {step}: {plain_name(not_finite[0])} and {len(not_finite) - 1} more leaves of the state are not finite"
        f" after the update, so nothing was saved; last good checkpoint: {self.last_good()}"
      )
    metadata = json.loads(json.dumps(dict(metadata)))
    metadata = {**metadata, "checksum": sums, "digest": runs.digest([sums, metadata])}
    if not self._directory.parent.is_dir():
      raise SaveError(f"checkpoint {step} cannot be written: {self._directory.parent} is gone")
    with self._writing(step):
      self._manager.save_checkpointables_async(step, {"state": tree}, custom_metadata=metadata)
    self._saving = step

  def when_written(self, call: Callable[[], object]) -> None:
    """Has `call` called once, as soon as it is known that a checkpoint of this object is on disk."""
    self._when_written = call

  @property
  def failing(self) -> bool:
    """Says whether the checkpoint that is being written has failed on this process; never waits."""
    return self._saving is not None and self._failure() is not None

  def _failure(self) -> Exception | None:
    return getattr(self._manager._manager._checkpointer._async_manager, "failure", None)

  def give_up(self) -> NoReturn:
    """Raises the `SaveError` of a checkpoint that failed on any process; all of them must call it."""
    with self._writing(self._saving):
      self._raise_failure()

  def _raise_failure(self) -> NoReturn:
    raise self._failure() or OSError("another process could not write its part")

  def _meet(self) -> None:
    """Returns when all processes have written their part, and raises as soon as one has failed."""
    while self._saving is not None and distributed.is_several():
      failed, busy = distributed.any_of(self.failing, self._manager.is_saving_in_progress())
      if failed:
        self._raise_failure()
      if not busy:
        return
      time.sleep(_POLL_SECONDS)

  def poll(self) -> None:
    """Raises a `SaveError` when the checkpoint that was being written has failed; never waits."""
    # Several processes learn together whether one has failed: the training loop has them agree.
    if self._saving is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      SaveError: if it could not be written.
    """
    with self._writing(self._saving):
      self._meet()
      self._manager.wait()
    if self._saving is not None and not (self._directory / str(self._saving)).is_dir():
      self._failed = True
      raise SaveError(f"checkpoint {self._saving} was written and is gone: {self._directory} was removed or replaced")
    written, self._saving = self._saving is not None, None
    if written:
      if self._when_written is not None:
        call, self._when_written = self._when_written, None
        call()
      self._each_written()

  def newest_metadata(self) -> dict[str, Any]:
    """Returns the metadata of the newest checkpoint, unverified; empty where the main process can read none."""
    try:
      newest = dict(self._manager.checkpointables_metadata(self.steps[-1]).custom_metadata)
    except Exception:  # `restore` says what is wrong.
      newest = {}
    return distributed.from_main(newest)

  def describe(self, step: int) -> dict[str, Any]:
    """Returns the shapes and dtypes of all leaves of a checkpoint, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    described = upgrades.new_names(self._manager.checkpointables_metadata(step).metadata["state"])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), described)

  def last_good(self) -> str:
    """Names the newest complete checkpoint, for messages."""
    found = finished_steps(self._directory)
    return str(found[-1]) if found else "none"

  @contextlib.contextmanager
  def _writing(self, step: int | None) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # TensorStore raises ValueError for a full disk, Orbax and the file system their own.
      if self._failed or step is None:
        raise
      self._failed = True
      for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(unfinished, ignore_errors=True)  # It holds the space that the next try needs.
      reason = " ".join(str(error).split())
      full = re.search(r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied", reason)
      raise SaveError(
        f"checkpoint {step} could not be written to {self._directory} ({full[0] if full else reason[:120]}); last good"
        f" checkpoint: {self.last_good()}; mend that and run the same command again"
      ) from None

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest checkpoint that can be read and whose checksum holds, or returns None.

    A damaged checkpoint is reported, moved aside to `<step>.damaged` and the one before it is used. All processes read
    the same one: the main process says which there are, and what one of them cannot read is used by none.

    Args:
      abstract: shapes, dtypes and shardings to restore into; the mesh may differ from the one that wrote.

    Raises:
      UserError: if there are checkpoints but all are damaged, or if one cannot be read now.
    """
    tree = _as_dict(abstract)
    damaged: dict[int, str] = {}
    for step in reversed(distributed.from_main(self.steps)):
      try:
        restored, metadata = verified(self._directory, step, functools.partial(upgrades.old_names, tree))
      except Damaged as error:
        damaged[step] = str(error)
        continue
      for bad, why in damaged.items():
        log.warning("Checkpoint %d is damaged (%s); going on from checkpoint %d.", bad, why, step)
        self._set_aside(bad)
      return TrainState(**upgrades.new_names(restored)), metadata
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
  """Parameters from a checkpoint, the number of updates they had, and the metadata of the checkpoint."""

  params: dict[str, Any]
  step: int
  metadata: dict[str, Any]


def restore_params(workdir: Path, step: int | None, place: Callable[[Any], Any] | None = None) -> Restored:
  """Restores the dual encoder as evaluation uses it: the moving average where one was kept, without anything else.

  Args:
    workdir: the run directory.
    step: step of the checkpoint; None is the newest that is sound, and a warning tells of newer ones that are not.
    place: a function from the abstract parameters to the same with shardings; None puts them on the first device.

  Raises:
    UserError: if the run has no such checkpoint, or it is damaged.
  """
  if step is not None and (isinstance(step, bool) or not isinstance(step, numbers.Integral)):
    raise UserError(f"step={step!r} must be a whole number, that of a checkpoint")
  directory = (Path(workdir) / "checkpoints").absolute()
  if not directory.is_dir():
    raise UserError(f"{workdir} has no checkpoints: train a model there first, or name another run")
  with ocp.training.Checkpointer(directory) as manager:
    steps = distributed.from_main([found.step for found in manager.checkpoints])
    if not steps or (step is not None and step not in steps):
      wanted = "no finished checkpoint" if not steps else f"no checkpoint of step {step}; it has {steps}"
      raise UserError(f"{workdir} has {wanted}")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def choose(described: Any) -> Any:
      shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), described)
      renamed = upgrades.new_names(shapes)
      wanted = {name: towers(renamed[name]) for name in ("params", "average") if name in shapes}
      if place is not None:
        wanted = {name: place(part) for name, part in wanted.items()}
      return _overlay(jax.tree.map(lambda _: ocp.PLACEHOLDER, shapes), wanted)

    damaged: dict[int, str] = {}
    for candidate in reversed(steps) if step is None else [step]:
      try:
        loaded, metadata = verified(directory, candidate, choose)
      except Damaged as error:
        damaged[candidate] = str(error)
        continue
      for bad, why in damaged.items():
        log.warning("Checkpoint %d of %s is damaged (%s): reading %d instead.", bad, workdir, why, candidate)
      break
    else:
      newest, why = next(iter(damaged.items()))
      raise UserError(f"checkpoint {newest} of {workdir} is damaged: {why}")
  loaded = upgrades.new_names(loaded)
  params = _overlay(towers(loaded["params"]), towers(loaded.get("average", {})))
  return Restored(params, candidate, metadata)


def _overlay(base: Any, over: Any) -> Any:
  if not isinstance(base, Mapping):
    return over
  return {name: _overlay(value, over[name]) if name in over else value for name, value in base.items()}
