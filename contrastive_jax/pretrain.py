"""Trains a config into a run directory, or resumes an unfinished run there; `train.py` calls this from a shell."""

import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from ml_collections import ConfigDict

from contrastive_jax import announcements, paths, sessions, upgrades
from contrastive_jax.announcements import say
from contrastive_jax.bad_records import FILE, BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.evaluate import evaluate, scalars
from contrastive_jax.evaluation.report import write_report
from contrastive_jax.evaluation.results import Result, headline, result_path
from contrastive_jax.evaluation.stages import stage_scores
from contrastive_jax.evaluation.tasks import EvaluationSet, ReadSet
from contrastive_jax.evaluation.unreadable import UnreadableSet
from contrastive_jax.inference import Model
from contrastive_jax.parallel import distributed
from contrastive_jax.parallel.mesh import host_share
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.run_lock import RunLock
from contrastive_jax.runs import read_json_lines, write_config, write_folder
from contrastive_jax.schedule.segments import Segment, segment_at, source_names
from contrastive_jax.training import growth, loop, mirror_restore
from contrastive_jax.training.balancing import balancing_term, with_balanced_bias
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.config import check_names_and_numbers, check_resume
from contrastive_jax.training.distillation import load_teacher
from contrastive_jax.training.initialize import initial_state
from contrastive_jax.training.metrics import Writer
from contrastive_jax.training.mirror import Mirror, store_of
from contrastive_jax.training.run import Run
from contrastive_jax.training.sample_values import sample_values
from contrastive_jax.training.state import TrainState


@runtime_checkable
class Data(Protocol):
  """What training asks of the data. The module `data.build` is one, for all that a config can name."""

  def sample_counts(self, run: Run) -> dict[str, int]:
    """Returns the number of samples of each source that a run names; asked for where a term remembers samples."""
    ...

  def open_sources(self, config: ConfigDict, names: Iterable[str]) -> Mapping[str, Any]:
    """Opens sources by name; each has a length."""
    ...

  def make_tokenizer(
    self, options: ConfigDict, vocab_size: int, sources: Iterable[Any], bad_records: BadRecords | None
  ) -> Tokenizer:
    """Returns the tokenizer that `config.tokenizer` names, or one trained on the captions of the sources."""
    ...

  def make_pipeline(
    self, run: Run, segments: Sequence[Segment], sources: Any, tokenizer: Tokenizer, **others: Any
  ) -> Any:
    """Makes the batches of a run: a `training.loop.BatchSource` that also has `kinds` and `cluster_digests`, and counts
    what it changed.
    """
    ...

  def evaluation_names(self, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of single evaluation sets, of names some of which stand for several."""
    ...

  def evaluation_set(self, config: ConfigDict, name: str) -> ReadSet:
    """Opens an evaluation set; its labels are read when the result is called."""
    ...

  def attribution(self, names: Iterable[str]) -> str:
    """Returns the credit that the licences of the sources ask for, or nothing."""
    ...


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How training ended.

  Attributes:
    step: the number of updates that were done, and saved.
    results: the final evaluations; none where the run was stopped, or was complete before.
    exit_code: 0 where the run is complete; else the exit code of a command that a signal stopped, which resumes it when
      it is run again.
  """

  step: int
  results: tuple[Result, ...] = ()
  exit_code: int = 0


def train(config: ConfigDict, workdir: str | PathLike, *, data: Data) -> Outcome:
  """Trains, evaluates and reports; an unfinished run in `workdir` is resumed.

  Args:
    config: the config, as `configs/common.py` describes it.
    workdir: the run directory, which is made. It is locked until this returns.
    data: where the samples and the evaluation sets come from, such as the module `data.build`.

  Returns:
    How it ended. SIGINT, SIGTERM and SIGHUP end it after a checkpoint.

  Raises:
    UserError: for a mistake in the config or the data, before anything is compiled.
    NonFiniteError: if a loss, gradient or parameter is not finite.
    SaveError: if a file or a checkpoint cannot be written.
  """
  began = time.monotonic()
  workdir = paths.run_to_write("workdir", workdir)
  distributed.initialize()
  check_names_and_numbers(config)
  store = store_of(config.workdir_mirror, workdir) if config.workdir_mirror else None
  if store is not None:
    mirror_restore.restore(store, workdir, lambda copy: check_resume(copy, Run.from_config(config, copy).config))
  run = Run.from_config(config, workdir, say)
  config = run.config
  evals, all_evals = data.evaluation_names(config.evals), data.evaluation_names((*config.final_evals, *config.evals))
  check_resume(workdir, config)
  mesh = run.make_mesh()
  run.check_host_memory(mesh)
  counts = data.sample_counts(run) if run.extras.state_rows else {}
  samples = sum(counts.values())
  spec, train_step = run.build(mesh, samples=samples)

  kept = {"keep_last": config.checkpoint_keep_last, "keep_every": config.checkpoint_keep_every}
  with (
    RunLock(workdir) as lock,
    Mirror(store, workdir, **kept) as mirrored,
    Checkpoints(workdir / "checkpoints", **kept, each_written=mirrored.update) as checkpoints,
  ):
    if counts:
      check_sample_counts(counts, checkpoints.newest_metadata())
    restored, metadata = checkpoints.restore(spec.abstract()) or (None, {})
    mirrored.update()  # It may lack checkpoints of an earlier start, of which none is known to be damaged now.
    start = int(restored.step) if restored else 0
    data_changed = check_resume(workdir, config, metadata.get("config"))
    growths = run.growths(metadata)
    if len(growths) > 1:
      spec, train_step = run.build(mesh, growths, samples=samples)
    if len(growths) > max(len(metadata.get("plans", ())), 1):
      say(growth.announced(run.schedule, growths, start))
    segments = run.segments_after(metadata, start, data_changed=data_changed)
    sources = data.open_sources(config, source_names(segments))
    listed = workdir / (FILE if distributed.is_main() else f"{jax.process_index()}.{FILE}")
    bad_records = BadRecords(listed, limit=config.data.max_bad_share)
    expected = metadata.get("tokenizer")
    tokenizer = find_tokenizer(config, workdir, restored is not None, expected, sources, bad_records, data)
    run.check_text_lengths(tokenizer)
    teacher = None
    if config.distillation.teacher:
      teacher = load_teacher(config.distillation.teacher, mesh, accumulate=config.accumulation)
    pipeline = data.make_pipeline(
      run, segments, sources, tokenizer, share=host_share(mesh), start=start, teacher=teacher, bad_records=bad_records
    )
    check_same_clusters(pipeline.cluster_digests, config.data.clusters, metadata)
    sets = {name: data.evaluation_set(config, name) for name in all_evals}
    if start >= config.total_steps and is_reported(workdir, sets, start):
      say(f"{workdir} is complete at step {start}; its report is {workdir / 'report.html'}")
      return Outcome(start)

    state = restored or initial_state(
      spec,
      seed=config.seed,
      init_from=config.init_from and str(paths.typed("init_from", config.init_from)),
      towers=config.init_towers,
      say=say,
    )
    # Weights of all towers bring their bias along.
    fresh = restored is None and not (config.init_from and config.init_towers == "all")
    if fresh and balancing_term(run.objective) is not None:
      _, first = next(iter(pipeline.iterate(0, 1)))
      state = with_balanced_bias(spec, state, first, accumulate=config.accumulation)
      say(f"The logit bias begins at {float(state.params['logit_bias']):.3f}, found from the first batch.")
    if restored is None and config.init_from:
      announcements.say_if_scale_is_cut(state, config.max_logit_scale)
    model = Model(spec.model, state.evaluated(), tokenizer, mesh=mesh)

    def score(state: TrainState, names: Iterable[str]) -> list[Result]:
      scored = model.with_params(state.evaluated()).with_resolution(**resolutions_at(segments, int(state.step)))
      chosen = read_sets(sets[name] for name in names)
      labels = {"workdir": workdir, "step": int(state.step), "architecture": run.called(workdir)}
      lock.confirm(here=True)
      return evaluate(scored, chosen, **labels, unreadable=say)

    writer = None
    if distributed.is_main():
      begin_run_directory(run, workdir, tokenizer, checkpoints, resumed=restored is not None)
      session = sessions.Session(workdir, began=began, start=start, devices=list(mesh.devices.flat))
      project = config.wandb_project
      writer = Writer(workdir, restored_step=start, wandb_project=project, config=run.as_json(), session=session)
    distributed.barrier("run directory")
    announcements.introduce(run, workdir, spec, mesh, sources, segments, start, data.attribution(sources))

    stop = distributed.StopRequest(mesh)
    state, complete = loop.train(
      workdir,
      state,
      train_step,
      pipeline,
      checkpoints,
      writer,
      run.loop_options(),
      mesh=mesh,
      metadata=metadata_of(run, segments, growths, tokenizer, counts, pipeline.cluster_digests),
      evaluate=lambda state: scalars(score(state, evals)),
      teach=teacher and teacher.targets,
      ahead=(run.abstract_batch(*kind, mesh) for kind in pipeline.kinds(start)),
      stop=stop,
      confirm=lock.confirm,
    )
    announcements.say_what_was_changed(pipeline)
    if not complete:
      say(
        f"Stopped at step {int(state.step)} of {config.total_steps}, which is saved;"
        " run the same command again to resume."
      )
      return Outcome(int(state.step), exit_code=stop.exit_code)
    results = score(state, sets)
    lock.confirm(here=True)
    samples_now = sample_values(spec, state)
    if writer is not None:
      writer.write({"step": int(state.step), **scalars(results)})
      writer.close()
      facts = {"Parameters": f"{announcements.count_parameters(spec):,}"}
      facts |= announcements.drawn_of(sources, segments, int(state.step))
      conclude(run, workdir, results, data.attribution(sources), facts, samples_now)
    lock.confirm(here=True)
  return Outcome(int(state.step), tuple(results))


def begin_run_directory(
  run: Run, workdir: Path, tokenizer: Tokenizer, checkpoints: Checkpoints, *, resumed: bool
) -> None:
  """Writes the config and the tokenizer of a run; the config of a resumed one with its first new checkpoint."""
  stored = workdir / "tokenizer"
  if resumed:  # Until this session has a checkpoint of its own, the run is what it was.
    checkpoints.when_written(lambda: write_config(workdir, run.as_json()))
  else:
    write_config(workdir, run.as_json())
    if stored.exists():
      shutil.rmtree(stored)  # Of a start that made no checkpoint, maybe from other data.
  if not stored.exists():
    write_folder(stored, tokenizer.save)


def metadata_of(
  run: Run,
  segments: Sequence[Segment],
  growths: Sequence[growth.Growth],
  tokenizer: Tokenizer,
  counts: Mapping[str, int],
  clusters: Mapping[str, str],
) -> dict[str, Any]:
  """Returns what every checkpoint of a run carries beside its state.

  Args:
    run: the run.
    segments: its segments.
    growths: how it grew.
    tokenizer: its tokenizer.
    counts: number of samples of each source that a state is for.
    clusters: a digest of the clusters of each source that whole batches are drawn from.
  """
  return {
    "segments": [segment.to_dict() for segment in segments],
    "tokenizer": tokenizer.fingerprint,
    **({"samples": dict(counts)} if counts else {}),
    **({"clusters": dict(clusters)} if clusters else {}),
    "plans": [dataclasses.asdict(grown) for grown in growths],
    "config": upgrades.stamped(run.as_json()),
  }


def check_sample_counts(counts: Mapping[str, int], metadata: Mapping[str, Any]) -> None:
  """Refuses other samples than those that the state of an objective was made for.

  Args:
    counts: number of samples of each source that the config names.
    metadata: those of a checkpoint, empty without one.

  Raises:
    UserError: with the sources that differ.
  """
  started = metadata.get("samples", counts)
  differ = sorted(name for name in {*started, *counts} if started.get(name) != counts.get(name))
  if differ:
    raise UserError(
      f"the objective keeps a state for every sample, so that the sources of the run cannot change: {', '.join(differ)}"
      " differ; start a new run with --config.init_from"
    )


def check_same_clusters(digests: Mapping[str, str], folder: str, metadata: Mapping[str, Any]) -> None:
  """Refuses a folder of clusters whose content is not what the run has drawn from.

  Args:
    digests: a digest of the clusters of each source that the rest of the run draws from.
    folder: `data.clusters`. The clusters of another folder make the rest of the run a segment of its own.
    metadata: those of the checkpoint, empty without one.

  Raises:
    UserError: with the sources whose clusters differ.
  """
  started = metadata.get("clusters", {})
  differ = sorted(name for name in digests if started.get(name, digests[name]) != digests[name])
  if differ and metadata["config"]["data"]["clusters"] == folder:
    raise UserError(
      f"data.clusters={folder} has other clusters of {', '.join(differ)} than those that the run has drawn from: put"
      " these back, or write the new ones to another folder and name it, so that the rest of the run draws from them"
    )


def read_sets(reads: Iterable[ReadSet]) -> Iterator[EvaluationSet]:
  """Yields evaluation sets, whose labels are read when the first is scored; one without labels is said and left out."""
  for read in reads:
    try:
      scored = read()
    except UnreadableSet as error:
      say(str(error))
    else:
      yield scored


def resolutions_at(segments: Sequence[Segment], step: int) -> dict[str, Any]:
  """Returns what the stage that made update number `step` is evaluated at: the resolutions of images and clips."""
  segment = segments[segment_at(segments, max(step, 1) - 1)[0]]
  if segment.clips is None:
    return {"resolution": segment.resolution}
  return {"resolution": segment.resolution, "clips": segment.clips.resolution, "frames": segment.clips.frames}


def find_tokenizer(
  config: ConfigDict,
  workdir: Path,
  resumed: bool,
  expected: str | None,
  sources: Mapping[str, Any],
  bad_records: BadRecords,
  data: Data,
) -> Tokenizer:
  """Returns the tokenizer of a resumed run; else that of the weights it starts from, else what the config names.

  Until there is a checkpoint, what an earlier start left is not taken: its data may have been others.

  Raises:
    UserError: if the run's tokenizer is not the one that its checkpoint was trained with.
  """
  stored = workdir / "tokenizer"
  vocab_size = config.model.text.vocab_size
  if resumed and stored.exists():
    tokenizer = tokenizers.load(stored)
    if expected not in (None, tokenizer.fingerprint):
      raise UserError(f"{stored} is not the tokenizer that the checkpoint was trained with: put the original back")
    return tokenizer
  if config.init_from and config.init_towers in ("all", "text"):
    tokenizer = tokenizers.load(paths.typed("init_from", config.init_from) / "tokenizer")
    if config.tokenizer.spec != "bpe" and tokenizers.load(config.tokenizer.spec).fingerprint != tokenizer.fingerprint:
      raise UserError(
        f"tokenizer.spec='{config.tokenizer.spec}' is not the tokenizer of init_from={config.init_from}:"
        " leave it at 'bpe' to take that one"
      )
    tokenizers.check_vocabulary(tokenizer, vocab_size)
    return tokenizer
  return data.make_tokenizer(config.tokenizer, vocab_size, sources.values(), bad_records)


def is_reported(workdir: Path, sets: Iterable[str], step: int) -> bool:
  """Says whether the evaluation and the report of the finished run are there."""
  return (workdir / "report.html").exists() and all(result_path(workdir, name, step).exists() for name in sets)


def conclude(
  run: Run,
  workdir: Path,
  results: Sequence[Result],
  attribution: str,
  facts: Mapping[str, str],
  samples: Mapping[str, Any],
) -> None:
  """Writes the report and prints the figures people ask for first."""
  stages = run.first_steps()
  worked = sessions.read(workdir)
  report = write_report(
    workdir / "report.html",
    title=run.called(workdir),
    config=run.as_json(),
    metrics=read_json_lines(workdir / "metrics.jsonl"),
    evaluations=results,
    attribution=attribution,
    facts={**facts, **sessions.facts(worked)},
    commands=sessions.commands(worked),
    stages=stages,
    by_stage=stage_scores(workdir, stages, run.config.total_steps) if stages else (),
    samples=samples,
  )
  for result in results:
    words = headline(result)
    say(f"{result.dataset}: {words['figure']} {words['sentence']}")
  say(f"Report: {report}")
