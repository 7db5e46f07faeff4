"""Resolves and checks a config once, into the `Run` that the commands and a script of one's own start from."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from contrastive_jax import paths
from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models import flops
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.presets import model_config
from contrastive_jax.objectives import Objective, Sizes, check_teacher, check_towers, make_objective, present_in
from contrastive_jax.objectives.term import REPLAYED, STATE_ROWS, TEACHER_TEXT, WEIGHTS
from contrastive_jax.parallel.mesh import MeshSpec, batch_shards
from contrastive_jax.preprocess import long_captions
from contrastive_jax.preprocess.tokenizers import Tokenizer, check_length
from contrastive_jax.runs import read_object
from contrastive_jax.schedule import shapes
from contrastive_jax.schedule.extras import Extras, TeacherDims
from contrastive_jax.schedule.segments import Segment, resume, source_names
from contrastive_jax.schedule.stages import Stage, first_steps, segments_of, source_terms, stages_of, weighted_sources
from contrastive_jax.training import config as configs
from contrastive_jax.training import growth, host_memory, initialize
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.balancing import check_bias
from contrastive_jax.training.checkpoint import has_checkpoint
from contrastive_jax.training.fields import checked_config
from contrastive_jax.training.growth import Growths
from contrastive_jax.training.loop import LoopOptions
from contrastive_jax.training.stage_factors import check_weights, learning_rate, term_factors
from contrastive_jax.training.state import StateSpec
from contrastive_jax.training.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A config that `from_config` resolved and checked.

  Attributes:
    config: the values it was made from, with the model that `init_from` brings; nobody changes them any more.
    model: the sizes of both towers.
    stages: the stages of the run; a single one where the config has no curriculum.
    segments: the segment that each stage becomes.
    objective: the objective that the run minimises.
    extras: what its batches bring beside images, captions and keys.
  """

  config: ConfigDict
  model: DualEncoderConfig
  stages: tuple[Stage, ...]
  segments: tuple[Segment, ...]
  objective: Objective
  extras: Extras

  @classmethod
  def from_config(
    cls, config: ConfigDict, workdir: Path | None = None, say: Callable[[str], None] = lambda sentence: None
  ) -> "Run":
    """Resolves a config, and refuses what cannot work on any machine. JAX is not started.

    Args:
      config: the config, as `configs/common.py` describes it.
      workdir: the directory of a run that is about to be trained. A run that is only planned has none, and weights of
        `init_from` that are not on this machine are then not asked for.
      say: is told in a sentence what was taken from elsewhere.

    Raises:
      UserError: for a field that no config has, one that is missing, of another type or out of its range, and for
        values that contradict each other.
    """
    configs.check_names_and_numbers(config)
    if workdir is not None or _has_initial_model(config):
      config = initialize.with_initial_model(config, workdir, say)
    _check_choices(config)
    objective = make_objective(term_weights(config), config.loss_options.to_dict(), config.loss_dtype)
    segments = segments_of(config)
    run = cls(
      config=config.copy_and_resolve_references().lock(),
      model=model_config(config),
      stages=stages_of(config),
      segments=segments,
      objective=objective,
      extras=_extras(config, objective, segments),
    )
    check_pairs(run.segments, objective)
    check_squares(run.segments, objective)
    check_scale(run.model, config)
    check_bias(run.model, objective)
    check_average(objective, config.average_decay)
    check_weights(run.stages, objective)
    check_replay(tuple(config.distillation.replay), run.source_names(), objective)
    check_towers(objective, run.model.names)
    for segment in run.segments:
      check_model_fits(segment, run.model)
    run.schedule()
    if workdir is not None and config.init_from and not has_checkpoint(workdir):
      paths.run_to_read("init_from", config.init_from)  # Only a run without checkpoints needs it.
    return run

  def as_json(self) -> dict[str, Any]:
    """Returns the config as JSON would give it back."""
    return configs.as_json(self.config)

  def called(self, workdir: Path) -> str:
    """Returns the name of the run in results and in the report: that of the config, or of its directory."""
    return self.config.name or workdir.resolve().name

  @property
  def term_weights(self) -> dict[str, float]:
    """The name of each term of the objective, and its weight."""
    return term_weights(self.config)

  def check_text_lengths(self, tokenizer: Tokenizer) -> None:
    """Raises a `UserError` where captions are cut to fewer tokens than the tokenizer needs for one."""
    check_length(tokenizer, self.model.text.length)
    for number, segment in enumerate(self.segments):
      if segment.text_length:
        check_length(tokenizer, segment.text_length, f"curriculum.{number}.text_length")

  def source_names(self) -> list[str]:
    """Returns the names of the sources of all segments, each once."""
    return source_names(self.segments)

  def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Makes the mesh of the run, of all devices that JAX has unless some are given."""
    return MeshSpec(**self.config.mesh).make(devices)

  def schedule(self, growths: Growths = ()) -> optimizers.Schedule:
    """Makes the learning rate of each step; `growths` are those of the run, as `growth.read` returns them."""
    options = {name: value for name, value in self.config.schedule.to_dict().items() if name != "on_growth"}

    def over(steps: int) -> optimizers.Schedule:
      return optimizers.make_schedule(peak=self.config.optimizer.learning_rate, total_steps=steps, **options)

    schedule = growth.grown(over, growths) if growths else over(self.config.total_steps)
    return learning_rate(schedule, self.stages)

  def growths(self, metadata: Mapping[str, Any]) -> tuple[growth.Growth, ...]:
    """Reads how the run grew from the metadata of its checkpoint, which are empty for a new run."""
    schedule, total_steps = self.config.schedule, self.config.total_steps
    if schedule.name in ("constant", "rsqrt") and not schedule.cooldown_steps:
      return (growth.Growth(total_steps),)  # Their rates do not depend on the number of steps.
    planned = sum(segment["steps"] for segment in metadata.get("segments", ()))
    return growth.read(metadata, planned, total_steps, schedule.get("on_growth", growth.DEFAULT))

  def segments_after(self, metadata: Mapping[str, Any], step: int, *, data_changed: bool) -> tuple[Segment, ...]:
    """Returns the segments that were done, and those that are left.

    Args:
      metadata: those of the checkpoint; empty for a new run.
      step: step of the checkpoint.
      data_changed: whether the rest of the run draws from other data, as `config.check_resume` says.
    """
    done = [Segment.from_dict(fields) for fields in metadata.get("segments", ())]
    return resume(done, self.segments, step, changed=data_changed)

  def loop_options(self) -> LoopOptions:
    """Makes the options of the loop."""
    config, extras = self.config, self.extras
    patches = self.segments[0].inputs("image").kept(self.model.image.grid**2)
    return LoopOptions(
      total_steps=config.total_steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      eval_every=config.eval_every,
      log_sample_ids=config.log_sample_ids,
      profile_steps=tuple(config.profile_steps),
      stop_on_nonfinite=config.on_nonfinite == "stop",
      max_skipped_steps=config.get("max_skipped_steps", 10),
      # A backward pass costs two forward passes. The stages of a curriculum have no one number of tokens a pair.
      flops_per_pair=0.0
      if config.curriculum
      else 3 * flops.forward_flops_per_pair(self.model, images=extras.images, texts=extras.texts, patches=patches),
      unlearned=self.objective.unlearned,
      stages=tuple(self.first_steps()),
    )

  def first_steps(self) -> list[tuple[str, int]]:
    """Returns the name and the first step of each stage; none where there is no curriculum."""
    return first_steps(self.stages) if self.config.curriculum else []

  def check_host_memory(self, mesh: jax.sharding.Mesh) -> None:
    """Raises a `UserError` for a batch of which this host cannot hold its share."""
    host_memory.check_host_memory(self.segments, self.model, mesh, self.extras)

  def build(self, mesh: jax.sharding.Mesh, growths: Growths = (), *, samples: int = 0) -> tuple[StateSpec, TrainStep]:
    """Makes the state's specification and the train step.

    Args:
      mesh: the mesh that the state and the batches lie on.
      growths: the growths of a run whose `total_steps` grew, as `growth.read` returns them.
      samples: number of samples in all sources, for terms that keep a state for each.

    Raises:
      UserError: if the batch does not divide over the mesh or `frozen` is wrong.
    """
    config = self.config
    check_divides(self.segments, batch_shards(mesh), config.accumulation)
    schedule = self.schedule(growths)
    spec = StateSpec(
      model=self.model,
      optimizer=optimizers.make_optimizer(config.optimizer, schedule),
      frozen=tuple(config.frozen),
      average=config.average_decay > 0,
      mesh=mesh,
      rules=MeshSpec(**config.mesh),
      objective=self.objective,
      sizes=Sizes(
        self.model.embed_dim,
        self.extras.teacher_dims and self.extras.teacher_dims[0],
        samples,
        max(segment.batch_size for segment in self.segments),
      ),
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
      factors=term_factors(self.stages, self.objective),
    )
    return spec, step

  def abstract_batch(self, segment: Segment, modality: str, length: int, mesh: jax.sharding.Mesh) -> Batch:
    """Describes one kind of batch of a segment, in shapes with shardings, as `shapes.abstract_batch` does."""
    return shapes.abstract_batch(segment, modality, length, self.model, mesh, self.extras)


def term_weights(config: ConfigDict) -> dict[str, float]:
  """Returns the terms of `objective` with their weights, or `loss` alone where there are none."""
  return config.objective.to_dict() or {config.loss: 1.0}


def _has_initial_model(config: ConfigDict) -> bool:
  return bool(config.init_from) and (paths.typed("init_from", config.init_from) / "config.json").is_file()


def _check_choices(config: ConfigDict) -> None:
  """Raises a `UserError` for a field whose value is none of those it may have."""
  require_known("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
  require_known("data.long_captions", config.data.long_captions, long_captions.WAYS)
  for name in ("compute_dtype", "loss_dtype"):
    require_known(name, config[name], ("float32", "bfloat16"))
  initialize.check_choices(config)
  require_known("schedule.on_growth", config.schedule.get("on_growth", growth.DEFAULT), growth.WAYS)
  require_known("optimizer.name", config.optimizer.name, optimizers.OPTIMIZERS)
  steps = tuple(config.profile_steps)
  if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
    raise UserError(f"profile_steps={steps} must be empty or (first, last), counted from 1")
  if steps and steps[0] > config.total_steps:
    raise UserError(f"profile_steps={steps} begins after total_steps={config.total_steps}: name steps of the run")
  if not weighted_sources("data.sources", config.data.sources.to_dict()):
    raise UserError("data.sources={} needs at least one source, each with a weight above 0")


def check_scale(model: DualEncoderConfig, config: ConfigDict) -> None:
  """Raises a `UserError` for a logit scale that begins where no update would leave it."""
  if config.init_from and config.init_towers == "all":
    return  # It is that of the weights.
  scale, most = math.exp(model.init_logit_scale), config.max_logit_scale
  if not 1 - 1e-6 <= scale <= most * (1 + 1e-6):
    raise UserError(
      f"model.init_logit_scale={model.init_logit_scale} is a scale of {scale:.4g}, and updates keep it from 1 to"
      f" max_logit_scale={most}: begin between 0 and {math.log(most):.3f}, or raise max_logit_scale"
    )


def check_average(objective: Objective, average_decay: float) -> None:
  """Raises a `UserError` where a term compares with the moving average of the towers and there is none."""
  if objective.uses_average and not average_decay:
    raise UserError(
      f"{average_decay=} keeps no moving average of the towers, which the objective compares with: set it to 0.999, or"
      " turn the option average of the term off, or leave the term out"
    )


def check_replay(replay: Sequence[str], sources: Sequence[str], objective: Objective) -> None:
  """Raises a `UserError` where sources are to be replayed that the run lacks, or for no term."""
  for name in replay:
    require_known("distillation.replay", name, sources)
  if replay and not objective.needs(REPLAYED):
    raise UserError(f"distillation.replay={tuple(replay)} has no use: add distill_positives to the objective")


def check_pairs(segments: Sequence[Segment], objective: Objective) -> None:
  """Raises a `UserError` for a batch of one pair where a term compares pairs with each other only."""
  alone = [name for name, (_, term) in objective.terms.items() if term.compares_pairs]
  for segment in segments:
    if alone and segment.batch_size < 2:
      stage = f" of stage '{segment.name}'" if segment.name else ""
      raise UserError(
        f"batch_size={segment.batch_size}{stage} leaves nothing to compare a pair with, so that {alone[0]} learns"
        " nothing: use at least 2"
      )


def check_squares(segments: Sequence[Segment], objective: Objective) -> None:
  """Raises a `UserError` where a term needs squares of one size and a stage shows other images, or clips."""
  for name in [name for name, (_, term) in objective.terms.items() if term.reads_squares]:
    for number, segment in enumerate(segments):
      stage = f"stage '{segment.name}'" if segment.name else "the run"
      if segment.clips is not None:
        raise UserError(f"{stage} shows clips, which {name} cannot read: set curriculum.{number}.video_share to 0")
      if segment.resolution.mode != "fixed":
        raise UserError(
          f"{stage} shows images of any shape, and {name} needs squares: set curriculum.{number}.mode to 'fixed'"
        )
      if segment.drop_patches:
        raise UserError(
          f"{stage} drops patches (drop_patches={segment.drop_patches}), and {name} needs all of an image: set"
          " drop_patches to 0"
        )


def check_model_fits(segment: Segment, model: DualEncoderConfig) -> None:
  """Raises a `UserError` where a stage asks for what the towers cannot read."""
  stage = f"stage '{segment.name}'" if segment.name else "the run"
  all_inputs = [segment.inputs(modality) for modality in segment.modalities]
  if model.image.class_token and any(inputs.rows for inputs in all_inputs):
    raise UserError(f"{stage} packs images, and model.image.class_token=True has no place in packed rows: turn one off")
  if segment.text_rows is not None and (model.text.attend_padding or model.text.pool == "last"):
    raise UserError(
      f"{stage} packs captions (text_rows={segment.text_rows.count}), which needs model.text.attend_padding=False"
      " and a model.text.pool other than 'last'"
    )
  if segment.text_length > model.text.length:
    raise UserError(
      f"{stage} has text_length={segment.text_length}, more than model.text.length={model.text.length}: lower it, or"
      " raise that"
    )
  segment.check_patches(model.image.patch_size)
  for inputs in all_inputs:
    times = inputs.times(model.image.tubelet)
    if model.image.time_position == "learned" and times > model.image.max_time:
      raise UserError(
        f"{stage} has clips of {times} tubelets, more than model.image.max_time={model.image.max_time}: raise that"
      )
    most = inputs.kept(inputs.resolution.max_tokens)
    if inputs.rows and inputs.resolution.mode == "native" and most > inputs.rows.length:
      left = f", of which drop_patches={inputs.drop_patches} leaves {most}" if inputs.drop_patches else ""
      raise UserError(
        f"{stage} allows max_tokens={inputs.resolution.max_tokens}{left}, more than its row_length="
        f"{inputs.rows.length}: an image must fit into a row"
      )


def check_divides(segments: Sequence[Segment], shards: int, accumulation: int) -> None:
  """Raises a `UserError` for a batch that does not divide over the shards, or a shard over its micro-batches."""
  for segment in segments:
    size, pack = segment.batch_size, segment.pack_pairs or 1
    if size % (shards * pack):
      packs = f" in packs of data.pack_pairs={pack}" if pack > 1 else ""
      raise UserError(
        f"batch_size={size} does not divide over {shards} devices{packs}: use a multiple of {shards * pack}"
      )
    if size // shards % (accumulation * pack):
      raise UserError(
        f"accumulation={accumulation} does not divide the {size // shards} pairs of each of {shards} devices:"
        f" use a batch_size that is a multiple of {shards * accumulation * pack}"
      )


def _extras(config: ConfigDict, objective: Objective, segments: Sequence[Segment]) -> Extras:
  """Returns what the objective asks of batches beside images, captions and keys."""
  return Extras(
    state_rows=objective.needs(STATE_ROWS),
    weights=objective.needs(WEIGHTS),
    replayed=tuple(config.distillation.replay) if objective.needs(REPLAYED) else None,
    hard_captions=objective.captions_needed,
    strong_images=objective.strong_images,
    strong_texts=objective.strong_texts,
    present_in=present_in(objective, source_names(segments), source_terms(config)),
    teacher_dims=_teacher_dims(config, objective),
  )


def _teacher_dims(config: ConfigDict, objective: Objective) -> TeacherDims:
  """Returns the features of the teacher's images, and of its captions where a term asks; None where no term distils.

  Raises:
    UserError: if the teacher is not named or not there.
  """
  distillation = config.distillation
  check_teacher(objective, teacher=distillation.teacher, targets=distillation.targets)
  if not objective.distils:
    return None
  dim = distillation.dim or _features_of_teacher(distillation)
  return dim, dim if objective.needs(TEACHER_TEXT) else None


def _features_of_teacher(distillation: ConfigDict) -> int:
  field, name = ("teacher", "config.json") if distillation.teacher else ("targets", "teacher.json")
  folder = paths.typed(f"distillation.{field}", distillation[field])
  if not (folder / name).is_file():
    raise UserError(
      f"distillation.{field}={distillation[field]} has no {name}: name a run, or a folder that distill.py wrote"
    )
  if distillation.teacher:
    return model_config(checked_config(folder)).embed_dim
  dim = read_object(folder / name).get("dim")
  if not isinstance(dim, int) or dim < 1:
    raise UserError(f"{folder / name} has dim={dim!r} for the size of the embeddings: put back what distill.py wrote")
  return dim
