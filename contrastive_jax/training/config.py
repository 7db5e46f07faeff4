"""Checks a run's config before anything is built, and turns it into what the library takes."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from contrastive_jax import paths
from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models import flops
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.presets import model_config
from contrastive_jax.objectives import Objective, Sizes, check_teacher, make_objective, term_options
from contrastive_jax.objectives.term import STATE_ROWS, TEACHER_TEXT
from contrastive_jax.parallel.mesh import MeshSpec, batch_shards
from contrastive_jax.runs import read_config, read_object
from contrastive_jax.training import growth, host_memory, shapes
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.checkpoint import has_checkpoint
from contrastive_jax.training.curriculum import Segment
from contrastive_jax.training.fields import check_fields
from contrastive_jax.training.growth import Growths
from contrastive_jax.training.loop import LoopOptions
from contrastive_jax.training.ranges import check_ranges
from contrastive_jax.training.shapes import TeacherDims
from contrastive_jax.training.stages import (
  distillation_weight,
  first_steps,
  learning_rate,
  segments_of,
  stages_of,
  weighted_sources,
)
from contrastive_jax.training.state import StateSpec
from contrastive_jax.training.step import TrainStep, make_train_step

# What may differ when a run is resumed: where and how it runs and what it reports, not what it computes.
_FREE_ON_RESUME = (
  "mesh.",
  "accumulation",
  "log_",
  "checkpoint_",
  "eval_every",
  "evals",
  "final_evals",
  "profile_steps",
  "wandb_project",
  "init_model",
  "schedule.on_growth",
  "on_nonfinite",
  "max_skipped_steps",
  "data.threads",
  "data.workers",
  "data.prefetch_bytes",
  "data.data_dir",
  "data.max_bad_share",
)


def check_names_and_numbers(config: Any) -> None:
  """Raises a `UserError` for a field that no config has, one that is missing, of another type or out of its range."""
  content = as_json(config)
  check_fields(content)
  check_ranges(content)


def check(config: Any) -> None:
  """Raises a `UserError` for values that cannot work on any machine."""
  check_names_and_numbers(config)
  require_known("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
  for name in ("compute_dtype", "loss_dtype"):
    require_known(name, config[name], ("float32", "bfloat16"))
  require_known("init_towers", config.init_towers, ("all", "image", "text"))
  require_known("schedule.on_growth", config.schedule.get("on_growth", growth.DEFAULT), growth.WAYS)
  require_known("optimizer.name", config.optimizer.name, optimizers.OPTIMIZERS)
  steps = tuple(config.profile_steps)
  if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
    raise UserError(f"profile_steps={steps} must be empty or (first, last), counted from 1")
  if not weighted_sources("data.sources", config.data.sources.to_dict()):
    raise UserError("data.sources={} needs at least one source, each with a weight above 0")
  objective_of(config)
  model = model_config(config)
  segments = segments_of(config)
  _check_pairs(segments, term_weights(config))
  for segment in segments:
    check_model_fits(segment, model)
  make_schedule(config)
  teacher_dims(config)


def check_init_from(config: Any) -> None:
  """Raises a `UserError` when `init_from` is not a run. Only a run without checkpoints needs it."""
  if config.init_from:
    paths.run_to_read("init_from", config.init_from)


def check_host_memory(config: Any, mesh: jax.sharding.Mesh) -> None:
  """Raises a `UserError` for a batch of which this host cannot hold its share."""
  host_memory.check_host_memory(segments_of(config), model_config(config), mesh, teacher_dims=teacher_dims(config))


def _check_pairs(segments: Sequence[Segment], terms: Mapping[str, float]) -> None:
  """Raises a `UserError` for a batch of one pair where a term compares pairs with each other only."""
  alone = [name for name in terms if name in ("softmax", "distill_similarity", "distill_relational")]
  for segment in segments:
    if alone and segment.batch_size < 2:
      stage = f" of stage '{segment.name}'" if segment.name else ""
      raise UserError(
        f"batch_size={segment.batch_size}{stage} leaves nothing to compare a pair with, so that {alone[0]} is always 0:"
        " use at least 2"
      )


def check_model_fits(segment: Segment, model: DualEncoderConfig) -> None:
  """Raises a `UserError` where a stage asks for what the towers cannot read."""
  stage = f"stage '{segment.name}'" if segment.name else "the run"
  feeds = [segment.feed(modality) for modality in segment.modalities]
  if model.vision.class_token and any(feed.rows for feed in feeds):
    raise UserError(
      f"{stage} packs images, and model.vision.class_token=True has no place in packed rows: turn one off"
    )
  if segment.text_rows is not None and (model.text.attend_padding or model.text.pool == "last"):
    raise UserError(
      f"{stage} packs captions (data.text_rows={segment.text_rows.count}), which needs model.text.attend_padding=False"
      " and a model.text.pool other than 'last'"
    )
  for feed in feeds:
    times = feed.times(model.vision.tubelet)
    if model.vision.time_position == "learned" and times > model.vision.max_time:
      raise UserError(
        f"{stage} has clips of {times} tubelets, more than model.vision.max_time={model.vision.max_time}: raise that"
      )
    side = model.vision.patch_size
    if feed.resolution.mode == "fixed" and feed.resolution.size < side:
      raise UserError(f"{stage} has size={feed.resolution.size}, less than model.vision.patch_size={side}")
    if feed.rows and feed.resolution.mode == "native" and feed.resolution.max_tokens > feed.rows.length:
      raise UserError(
        f"{stage} allows max_tokens={feed.resolution.max_tokens}, more than its row_length={feed.rows.length}: an image"
        " must fit into a row"
      )


def term_weights(config: Any) -> dict[str, float]:
  """The terms of `objective`, or `loss` alone where there are none."""
  return config.objective.to_dict() or {config.loss: 1.0}


def objective_of(config: Any) -> Objective:
  """What the run minimises."""
  return make_objective(term_weights(config), config.loss_options.to_dict(), config.loss_dtype)


def sizes_of(config: Any, samples: int = 0) -> Sizes:
  """What the shapes of the objective's parameters and state depend on; `samples` is the number in all sources."""
  dims = teacher_dims(config)
  return Sizes(model_config(config).embed_dim, dims and dims[0], samples)


def teacher_dims(config: Any) -> TeacherDims:
  """Features of the teacher's images, and of its captions where a term asks for them; None where no term distils.

  Raises:
    UserError: if the teacher is not named or not there.
  """
  objective, distillation = objective_of(config), config.distillation
  check_teacher(objective, teacher=distillation.teacher, targets=distillation.targets)
  if not objective.distils:
    return None
  dim = distillation.dim or _features_of_teacher(distillation)
  return dim, dim if objective.needs(TEACHER_TEXT) else None


def _features_of_teacher(distillation: Any) -> int:
  field, name = ("teacher", "config.json") if distillation.teacher else ("targets", "teacher.json")
  folder = paths.typed(f"distillation.{field}", distillation[field])
  if not (folder / name).is_file():
    raise UserError(
      f"distillation.{field}={distillation[field]} has no {name}: name a run, or a folder that distill.py wrote"
    )
  return model_config(read_config(folder)).embed_dim if distillation.teacher else read_object(folder / name)["dim"]


def make_schedule(config: Any, growths: Growths = ()) -> optimizers.Schedule:
  """The learning rate of each step; `growths` are those of the run, see `growth.read`."""

  def over(steps: int) -> optimizers.Schedule:
    options = {name: value for name, value in config.schedule.to_dict().items() if name != "on_growth"}
    return optimizers.make_schedule(peak=config.optimizer.learning_rate, total_steps=steps, **options)

  schedule = growth.grown(over, growths) if growths else over(config.total_steps)
  return learning_rate(schedule, stages_of(config))


def plans_of(config: Any, about: Mapping[str, Any]) -> tuple[growth.Growth, ...]:
  """The plans of a run, given what its checkpoint holds beside the state, which is empty for a new run."""
  if config.schedule.name in ("constant", "rsqrt") and not config.schedule.cooldown_steps:
    return (growth.Growth(config.total_steps),)  # Their rates do not depend on the number of steps.
  planned = sum(segment["steps"] for segment in about.get("segments", ()))
  return growth.read(about, planned, config.total_steps, config.schedule.get("on_growth", growth.DEFAULT))


def loop_options(config: Any) -> LoopOptions:
  """The loop's part of the config."""
  return LoopOptions(
    total_steps=config.total_steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    eval_every=config.eval_every,
    log_sample_ids=config.log_sample_ids,
    profile_steps=tuple(config.profile_steps),
    stop_on_nonfinite=config.on_nonfinite == "stop",
    max_skipped_steps=config.get("max_skipped_steps", 10),
    # A backward pass costs two forward passes.
    # The stages of a curriculum have no one number of tokens a pair.
    flops_per_pair=0.0 if config.curriculum else 3 * flops.forward_flops_per_pair(model_config(config)),
    stages=tuple(first_steps(stages_of(config))) if config.curriculum else (),
  )


def build(
  config: Any, mesh: jax.sharding.Mesh, growths: Growths = (), *, samples: int = 0
) -> tuple[StateSpec, TrainStep]:
  """The state's specification and the train step of a checked config.

  Args:
    config: of the run.
    mesh: where the state and the batches lie.
    growths: of a run whose `total_steps` grew, see `growth.read`.
    samples: number of samples in all sources, for terms that keep a state for each.

  Raises:
    UserError: if a field is unknown, the batch does not divide over the mesh or `frozen` is wrong.
  """
  check_names_and_numbers(config)
  shards = batch_shards(mesh)
  for segment in segments_of(config):
    size, pack = segment.batch_size, segment.pack_pairs or 1
    if size % (shards * pack):
      packs = f" in packs of data.pack_pairs={pack}" if pack > 1 else ""
      raise UserError(
        f"batch_size={size} does not divide over {shards} devices{packs}: use a multiple of {shards * pack}"
      )
    if size // shards % (config.accumulation * pack):
      raise UserError(
        f"accumulation={config.accumulation} does not divide the {size // shards} pairs of each of {shards} devices:"
        f" use a batch_size that is a multiple of {shards * config.accumulation * pack}"
      )
  schedule, objective = make_schedule(config, growths), objective_of(config)
  spec = StateSpec(
    model=model_config(config),
    optimizer=optimizers.make_optimizer(config.optimizer, schedule),
    frozen=tuple(config.frozen),
    average=config.average_decay > 0,
    mesh=mesh,
    rules=MeshSpec(**config.mesh),
    objective=objective,
    sizes=sizes_of(config, samples),
  )
  spec.shardings()  # Names what is wrong with `frozen` before anything is compiled.
  step = make_train_step(
    spec,
    schedule,
    seed=config.seed,
    accumulate=config.accumulation,
    average_decay=config.average_decay,
    max_logit_scale=config.max_logit_scale,
    skip_nonfinite=config.on_nonfinite == "skip",
    distillation_weight=distillation_weight(stages_of(config)) if objective.distils else None,
  )
  return spec, step


def abstract_batches(
  config: Any, kinds: Iterable[tuple[Segment, str, int]], mesh: jax.sharding.Mesh
) -> Iterator[Batch]:
  """One batch of each kind, see `shapes.abstract_batch`, in shapes with shardings."""
  options = {"teacher_dims": teacher_dims(config), "state_rows": objective_of(config).needs(STATE_ROWS)}
  for segment, modality, length in kinds:
    yield shapes.abstract_batch(segment, modality, length, model_config(config), mesh, **options)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def as_json(config: Any) -> dict[str, Any]:
  """The resolved config as JSON would give it back."""
  return json.loads(config.to_json())


def check_resume(workdir: Path, config: Any, saved: Mapping[str, Any] | None = None) -> bool:
  """Compares the config with the one that `workdir` was started with, once there is a checkpoint.

  Args:
    workdir: of the run.
    config: that the command gives.
    saved: the config that the restored checkpoint holds; None is that of `config.json`, for checkpoints of older
      versions and before one is read.

  Returns:
    Whether the data changed: then the rest of the run is a new segment.

  Raises:
    UserError: for a field that may not differ, with both values.
  """
  if not has_checkpoint(workdir) or (saved is None and not (workdir / "config.json").exists()):
    return False  # What a start that failed left behind binds nobody.
  started = read_config(workdir) if saved is None else saved
  # Fields that towers and losses have got since then are at their defaults.
  model = dataclasses.asdict(model_config(started))
  del model["dtype"]
  given = started.get("loss_options", {})  # Imported weights have none.
  options = {
    term: {name: option.default for name, option in known.items()} | given.get(term, {})
    for term, known in term_options().items()
  }
  old = dict(_flat(json.loads(json.dumps({**started, "model": model, "loss_options": options}))))
  new = dict(_flat(as_json(config)))
  # A field that did not exist then and is off now changes nothing.
  compared = {*old, *(name for name, value in new.items() if value)}
  changed = [name for name in sorted(compared) if old.get(name) != new.get(name)]
  data_changed = False
  for name in changed:
    if name.startswith(_FREE_ON_RESUME):
      continue
    if name.startswith("data."):
      data_changed = True
    elif name != "total_steps":
      raise UserError(
        f"{workdir} was started with {name}={old.get(name)!r}, not {new.get(name)!r}: give the old value, or start a"
        f" new run from its weights with --config.init_from={workdir} and another --workdir"
      )
    elif new[name] < old[name]:
      raise UserError(f"total_steps={new[name]} is less than the {old[name]} of {workdir}: a run may only grow")
  return data_changed
