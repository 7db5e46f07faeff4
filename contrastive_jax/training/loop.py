"""The training loop: batches in, steps out, and what happens every so many steps."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from contrastive_jax.batch import Batch
from contrastive_jax.errors import NonFiniteError
from contrastive_jax.parallel import distributed
from contrastive_jax.parallel.mesh import host_share, put_batch
from contrastive_jax.runs import JsonLines, write_object
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.metrics import Bar, Writer, peak_flops
from contrastive_jax.training.plateau import Plateau
from contrastive_jax.training.programs import Programs
from contrastive_jax.training.state import TrainState
from contrastive_jax.training.step import TrainStep

log = logging.getLogger(__name__)


# Share of the updates that may be skipped in the long run.
SKIPPED_SHARE = 0.1


@dataclasses.dataclass
class SkipBudget:
  """The number of updates that may be skipped.

  Attributes:
    most: the most skipped updates in a row, to which `SKIPPED_SHARE` of all updates is added for their sum.
    updates: number of updates so far, skipped ones included.
    skipped: number of skipped updates so far.
    in_a_row: number of skipped updates since the last that was not skipped.
  """

  most: int
  updates: int = 0
  skipped: int = 0
  in_a_row: int = 0

  def note(self, finite: bool) -> bool:
    """Counts an update, and says whether it is one skipped update too many."""
    self.updates += 1
    self.skipped += not finite
    self.in_a_row = 0 if finite else self.in_a_row + 1
    allowed = self.most + SKIPPED_SHARE * self.updates
    return not finite and (self.in_a_row > self.most or self.skipped > allowed)


@runtime_checkable
class BatchSource(Protocol):
  """A data pipeline, as the loop uses it."""

  def iterate(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]: ...

  def ids(self, step: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """The options of the loop.

  Attributes:
    total_steps: number of updates in the whole run.
    log_every: number of updates between rows of `metrics.jsonl`.
    checkpoint_every: number of updates between checkpoints; the last step is always saved.
    eval_every: number of updates between evaluations; 0 is never. The caller of `train` evaluates the last step.
    log_sample_ids: whether the ids of every batch are written to `sample_ids.jsonl`.
    profile_steps: (first, last) update of a `jax.profiler` trace, or empty.
    stop_on_nonfinite: whether a loss, a gradient or an updated parameter that is not finite raises.
    max_skipped_steps: with `stop_on_nonfinite` off, more skipped updates in a row than this raise as well, and so do
      more than this and `SKIPPED_SHARE` of all updates since the start of the loop.
    flops_per_pair: FLOPs of one training step for each pair, for the utilisation; 0 reports none.
    unlearned: returns the values that losses have where embeddings tell nothing, by the names of the metrics and for so
      many pairs in a batch. A loss that stays there is said.
    stages: (name, steps before it) of the stages of a curriculum. At the end of each there is a checkpoint and an
      evaluation.
  """

  total_steps: int
  log_every: int = 50
  checkpoint_every: int = 1000
  eval_every: int = 0
  log_sample_ids: bool = False
  profile_steps: tuple[int, ...] = ()
  stop_on_nonfinite: bool = True
  max_skipped_steps: int = 10
  flops_per_pair: float = 0.0
  unlearned: Callable[[int], Mapping[str, float]] = lambda pairs: {}
  stages: tuple[tuple[str, int], ...] = ()

  def stage(self, step: int) -> str:
    """Returns the name of the stage that update number `step` belongs to; empty where there are none."""
    return next((name for name, before in reversed(self.stages) if step > before), "")

  def ends_stage(self, step: int) -> bool:
    """Says whether a stage other than the last ends with update number `step`."""
    return any(step == before for _, before in self.stages[1:])


def train(
  workdir: Path,
  state: TrainState,
  train_step: TrainStep,
  pipeline: BatchSource,
  checkpoints: Checkpoints,
  writer: Writer | None,
  options: LoopOptions,
  *,
  mesh: jax.sharding.Mesh,
  metadata: dict[str, Any],
  evaluate: Callable[[TrainState], dict[str, float]] | None = None,
  teach: Callable[[Batch], Batch] | None = None,
  ahead: Iterable[Batch] = (),
  stop: distributed.StopRequest | None = None,
  confirm: Callable[..., None] = lambda here=False: None,
) -> tuple[TrainState, bool]:
  """Trains until `total_steps` or until somebody asks to stop.

  Args:
    workdir: the run directory.
    state: the state to begin with, which is consumed.
    train_step: the step that `make_train_step` returned.
    pipeline: the data, which gives batches from any step on.
    checkpoints: the checkpoints, written at intervals, at the end and when asked to stop.
    writer: the writer of metrics; None on all processes but the main one.
    options: the options of the loop.
    mesh: the mesh that batches are placed on.
    metadata: what a checkpoint holds beside its arrays.
    evaluate: a function that returns numbers, which are logged with their step. It is not called at the last step of
      the run, whose state is returned for the caller to score.
    teach: a function that adds to a batch on the devices the targets of a frozen teacher.
    ahead: abstract batches of the steps to come, one of each shape, which are compiled in the background in the order
      in which steps need them.
    stop: the request to stop; None makes one.
    confirm: is called before anything is written, and raises when the run directory belongs to another process by now
      or, called with `here=True` before a checkpoint, when it is gone.

  Returns:
    The state, and whether the run is complete.

  Raises:
    NonFiniteError: with the step, the file of its sample ids and the last good checkpoint.
    SaveError: at the step after a checkpoint could not be written.
  """
  start = int(state.step)
  steps = _Steps(workdir, pipeline, checkpoints, writer, options, mesh, start, confirm)
  with (
    stop or distributed.StopRequest(mesh) as stop,
    steps.bar,
    Programs(train_step, state, say=steps.bar.say) as programs,
  ):
    programs.prepare(ahead)
    for index, batch in steps.batches():
      batch = put_batch(mesh, batch.on_device())
      state, metrics = programs(state, batch if teach is None else teach(batch))
      done = index + 1
      steps.finish(done, metrics)
      checkpoints.poll()
      stopping = stop.agree(checkpoints.failing)
      if stop.failed:
        checkpoints.give_up()
      last = done == options.total_steps or stopping
      if last or done % options.checkpoint_every == 0 or options.ends_stage(done):
        # A checkpoint is only ever made of a state whose loss is known to be finite, and before anything that may fail.
        steps.settle()
        confirm(here=True)
        checkpoints.save(state, metadata)
      due = (options.eval_every and done % options.eval_every == 0) or options.ends_stage(done)
      if evaluate and due and done < options.total_steps:
        steps.settle()
        steps.record({"step": done, **evaluate(state)})
      if last:
        break
    steps.settle()
    checkpoints.wait()
    steps.close()
  return state, int(state.step) >= options.total_steps


# The time, and the seconds since the start of the loop in which the devices had no batch.
Clocks = tuple[float, float]


class _Steps:
  """Bookkeeping of the loop: clocks, rows, sample ids, profile, and the one step that is in flight."""

  def __init__(self, workdir, pipeline, checkpoints, writer, options, mesh, start, confirm):
    self._workdir, self._pipeline, self._checkpoints = workdir, pipeline, checkpoints
    self._writer, self._options, self._start, self._confirm = writer, options, start, confirm
    self.bar = Bar(start=start, total=options.total_steps, quiet=writer is None)
    self._ids = None
    if options.log_sample_ids and writer is not None:
      self._ids = JsonLines(workdir / "sample_ids.jsonl", restored_step=start)
    self._peak = peak_flops(list(mesh.devices.flat)) if options.flops_per_pair else math.inf
    self._in_flight: tuple[int, dict[str, jax.Array], Batch, Clocks, bool] | None = None
    self._batch: Batch | None = None
    self._hosts = host_share(mesh)[1]
    self._profiling = False
    self._budget = SkipBudget(options.max_skipped_steps)
    self._plateau = Plateau(options.unlearned)
    self._waited = 0.0  # Seconds since the start of the loop in which the devices had no batch.
    self._reset_clocks()

  def _reset_clocks(self, now: float | None = None, waited: float | None = None) -> None:
    """Begins a window of the rates, now or at a time that has passed, given the seconds of waiting until then."""
    self._clock = time.perf_counter() if now is None else now
    self._waited_before = self._waited if waited is None else waited
    self._steps, self._seen = 0, 0

  def batches(self) -> Iterator[tuple[int, Batch]]:
    """Yields batches, measures the time spent waiting for them and writes their ids."""
    iterator = iter(self._pipeline.iterate(self._start, self._options.total_steps))
    while True:
      before = time.perf_counter()
      item = next(iterator, None)
      self._waited += time.perf_counter() - before
      if item is None:
        return
      index, batch = item
      self._batch = batch
      ids = None if self._ids is None else self._pipeline.ids(index).tolist()
      self._confirm()  # Right before the write: a process may be suspended anywhere.
      if self._ids is not None:
        self._ids.write({"step": index + 1, "ids": ids})
      self._profile(index + 1)
      yield item

  def _profile(self, step: int) -> None:
    if not self._options.profile_steps:
      return
    first, last = self._options.profile_steps
    if not self._profiling and first <= step <= last:
      self._profiling = self._trace(lambda: jax.profiler.start_trace(str(self._workdir / "profile")))
    elif self._profiling and step > last:
      self.settle()
      self._trace(jax.profiler.stop_trace)
      self._profiling = False

  def _trace(self, call: Callable[[], object]) -> bool:
    """Starts or ends the profile; one that fails costs the profile and not the run."""
    try:
      call()
    except Exception as error:  # The profiler's own, and those of the file system.
      log.warning("The profile could not be written (%s).", " ".join(str(error).split())[:120])
      return False
    return True

  def finish(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step that has been dispatched and looks at those of the step before it."""
    # On CPUs a step has often run when its dispatch returns: it ended now, not when the next one has been dispatched.
    ended = _have_ended(metrics)
    clocks = (time.perf_counter(), self._waited)
    previous, self._in_flight = self._in_flight, (step, metrics, self._batch, clocks, ended)
    if previous is not None:
      self._look(*previous, next_ended=clocks if ended else None)

  def settle(self) -> None:
    """Waits for the step in flight and looks at it."""
    previous, self._in_flight = self._in_flight, None
    if previous is not None:
      self._look(*previous)

  def _look(
    self,
    step: int,
    metrics: dict[str, jax.Array],
    batch: Batch,
    clocks: Clocks,
    ended: bool,
    next_ended: Clocks | None = None,
  ) -> None:
    """Judges and logs a step.

    Args:
      step: its number.
      metrics: what it computed.
      batch: what it was given.
      clocks: the clocks when it had been dispatched.
      ended: whether it had ended by then.
      next_ended: the clocks when the next step had been dispatched and had ended; None where it runs.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if ended:
      now, waited = clocks
    elif next_ended:  # It ended somewhere between the two.
      now = (max(clocks[0], self._clock) + next_ended[0]) / 2
      waited = (max(clocks[1], self._waited_before) + next_ended[1]) / 2
    else:
      now, waited = time.perf_counter(), self._waited
    finite = bool(values.pop("finite"))
    too_many = self._budget.note(finite)
    if too_many or (not finite and self._options.stop_on_nonfinite):
      self._checkpoints.wait()
      raise NonFiniteError(self._not_finite(step, values))
    self._steps += 1
    pairs = batch.pairs * self._hosts
    self._seen += pairs
    self.bar.advance(step)
    for sentence in self._plateau.note(step, values, pairs):
      self.bar.say(sentence)
    first = step == self._start + 1
    if first or step % self._options.log_every == 0 or step == self._options.total_steps:
      seconds = now - self._clock
      rate = self._seen / seconds
      row = {
        "step": step,
        **values,
        "images_per_second": rate,
        "step_seconds": seconds / self._steps,
        "data_wait_fraction": (waited - self._waited_before) / seconds,
        **_fill(batch),
      }
      bad = getattr(self._pipeline, "substituted", 0)
      if bad:
        row["bad_records"] = bad
      if self._options.stages:
        row["stage"] = self._options.stage(step)
      if self._options.flops_per_pair and not first:
        row["model_flops_utilisation"] = rate * self._options.flops_per_pair / self._peak
      self.record(row)
      self.bar.show(row)
      # The first row holds the compilation; rates of the next window must not.
      self._reset_clocks(now, waited)

  def _not_finite(self, step: int, values: dict[str, float]) -> str:
    ids = self._pipeline.ids(step - 1).tolist()
    path = self._workdir / "nonfinite_ids.json"
    where = f"are in {path}"
    self._confirm()
    if distributed.is_main():
      try:
        write_object(path, {"step": step, "ids": ids}, indent=None)
      except OSError as error:
        where = f"could not be written to {path} ({error.strerror})"
    skips, budget = "", self._budget
    if not self._options.stop_on_nonfinite:
      before = f"{budget.skipped - 1} of {budget.updates - 1} in all"
      skips = f" after {budget.in_a_row - 1} skipped updates in a row, {before}"
    after = ""
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
      after = f", and with the learning rate {values['learning_rate']:.3g} the updated parameters are not finite"
    return (
      f"step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}{after}{skips}; the ids of its"
      f" {len(ids):,} pairs {where}; last good checkpoint: {self._checkpoints.last_good()}"
    )

  def record(self, row: dict[str, Any]) -> None:
    """Writes a row; time spent on evaluation does not count against the next rate."""
    self._confirm()
    if self._writer is not None:
      self._writer.write(row)
    self._reset_clocks()

  def close(self) -> None:
    if self._profiling:
      self._trace(jax.profiler.stop_trace)
    if self._ids is not None:
      self._ids.close()


def _have_ended(metrics: dict[str, jax.Array]) -> bool:
  """Says whether the devices have computed all of some metrics."""
  return all(value.is_ready() for value in metrics.values())


def _fill(batch: Batch) -> dict[str, float]:
  """Computes the share of this host's tokens that are no padding, where rows have any."""
  parts = {"image_token_fill": batch.image.segment_ids, "text_token_fill": batch.text.segment_ids}
  return {name: float(np.mean(ids > 0)) for name, ids in parts.items() if ids is not None}
