"""What a run minimises: one loss or a weighted sum of terms, each global or local.

A global term sees the embeddings of the whole batch at once. A local term is a sum over pairs that do not see each
other, divided by a count known from the batch alone, so that micro-batches can add it up. Terms that distil compare
with the targets of a frozen teacher; a batch without targets leaves them out.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from contrastive_jax import losses
from contrastive_jax.batch import Batch, Targets
from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.parallel.mesh import BATCH_AXES, ring_order
from contrastive_jax.parallel.placement import gathered

Metrics = dict[str, jax.Array]
Embeddings = tuple[Float[Array, "pairs dim"], Float[Array, "pairs dim"]]
# Name of a term -> its learned linear map from the student's space to the teacher's.
Projections = Mapping[str, Mapping[str, Array]]
NO_TEACHER_TEXT = (
  "objective.distill_similarity needs what the teacher makes of the captions, which a cache of targets does not hold:"
  " let the teacher run beside the model"
)
# Logical axes of a projection: FSDP splits it by the student's features.
PROJECTION_AXES = ("embed", None)
_SUPPLIED = (
  "image",
  "text",
  "teacher_image",
  "teacher_text",
  "logit_scale",
  "logit_bias",
  "group",
  "axis_name",
  "ring_order",
)


@dataclasses.dataclass(frozen=True)
class LocalTerm:
  """A sum over pairs divided by a count.

  Attributes:
    total: of the (image, text) embeddings of some pairs, their part of the batch, and the projections.
    count: of a batch; counts of its parts add up to it.
    distils: whether it compares with a teacher's targets.
    projected: whether it has a projection under its name.
  """

  total: Callable[[Embeddings, Batch, Projections], Float[Array, ""]]
  count: Callable[[Batch], Float[Array, ""]]
  distils: bool = False
  projected: bool = False


def _pairs(batch: Batch) -> Float[Array, ""]:
  return jnp.float32(batch.pairs)


def _alignment() -> LocalTerm:
  return LocalTerm(lambda embeddings, batch, _: jnp.sum(losses.squared_distances(*embeddings)), _pairs)


def _feature_distillation(distance: str = "cosine", projection: bool = True) -> LocalTerm:
  require_known("loss_options.distill_features.distance", distance, losses.DISTANCES)

  def total(embeddings, batch, projections):
    student, _ = embeddings
    if projection:
      kernel = gathered(projections["distill_features"]["kernel"], PROJECTION_AXES)
      student = jnp.matmul(student, kernel, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(losses.feature_distances(student, batch.targets.image, distance))

  return LocalTerm(total, _pairs, distils=True, projected=projection)


# Name -> a local term from its options.
LOCAL_TERMS = {"alignment": _alignment, "distill_features": _feature_distillation}
_TERMS = {**losses.OBJECTIVES, **losses.DISTILLATIONS, **LOCAL_TERMS}


@dataclasses.dataclass(frozen=True)
class Objective:
  """A weighted sum of terms.

  Attributes:
    global_terms: name -> (weight, loss on local shards; see `losses`).
    local_terms: name -> (weight, term).
    dtype: of the embeddings that global terms exchange and multiply; their logits and sums are float32.
    distillation_terms: global terms that also take the teacher's embeddings.
  """

  global_terms: Mapping[str, tuple[float, Callable]]
  local_terms: Mapping[str, tuple[float, LocalTerm]] = dataclasses.field(default_factory=dict)
  dtype: str = "float32"
  distillation_terms: Mapping[str, tuple[float, Callable]] = dataclasses.field(default_factory=dict)

  @property
  def distils(self) -> bool:
    """Whether any term compares with a teacher's targets."""
    return bool(self.distillation_terms) or any(term.distils for _, term in self.local_terms.values())

  @property
  def needs_teacher_text(self) -> bool:
    """Whether the targets must hold what the teacher makes of the captions."""
    return "distill_similarity" in self.distillation_terms

  def projections(self, student: int, teacher: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The projections of `StateSpec` for a student and a teacher of these embedding sizes.

    Raises:
      UserError: if a term compares features of different sizes without a projection.
    """
    features = {name: term for name, (_, term) in self.local_terms.items() if term.distils}
    for name, term in features.items():
      if not term.projected and student != teacher:
        raise UserError(
          f"loss_options.{name}.projection=False needs equal embedding sizes, the model has {student} and its teacher"
          f" {teacher}: set it to True"
        )
    return tuple((name, (student, teacher)) for name, term in features.items() if term.projected)

  def global_loss(
    self,
    embeddings: Embeddings,
    group: Int[Array, "pairs"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None,
    mesh: Mesh,
    *,
    targets: Targets | None = None,
    factor: Float[Array, ""] | float = 1.0,
  ) -> tuple[Float[Array, ""], Metrics]:
    """The global terms of embeddings that lie on the batch axes of `mesh`, and their metrics.

    Args:
      embeddings: of images and texts.
      group: of the pairs.
      logit_scale: multiplier of the similarities.
      logit_bias: added to the logits, or None.
      mesh: where the pairs lie.
      targets: of the teacher; without any the terms that distil are left out.
      factor: multiplies the weights of the terms that distil.

    Raises:
      UserError: if a term needs the teacher's texts and the targets hold none.
    """
    if targets is not None and targets.text is None and self.needs_teacher_text:
      raise UserError(NO_TEACHER_TEXT)
    order = ring_order(mesh)

    def local(image, text, group, logit_scale, logit_bias, targets, factor):
      options = {"logit_scale": logit_scale, "axis_name": BATCH_AXES, "ring_order": order}
      values, metrics = [], {}
      for name, (weight, loss) in self.global_terms.items():
        value, parts = loss(image, text, logit_bias=logit_bias, group=group, **options)
        values.append(weight * value)
        metrics |= parts | ({f"loss_{name}": value} if self._several else {})
      for name, (weight, loss) in self.distillation_terms.items() if targets is not None else ():
        value, parts = loss(image, text, targets.image, targets.text, **options)
        values.append(weight * factor * value)
        metrics |= parts | {f"loss_{name}": value}
      return sum(values), metrics

    pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(pairs, pairs, pairs, everywhere, everywhere, pairs, everywhere),
      out_specs=everywhere,
    )
    (image, text), targets = jax.tree.map(lambda side: side.astype(self.dtype), (embeddings, targets))
    return island(image, text, group, logit_scale, logit_bias, targets, jnp.asarray(factor, jnp.float32))

  def counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
    """What the local terms of a batch, or of parts of it, are divided by."""
    return {name: term.count(batch) for name, (_, term) in self.local_terms.items()}

  def local_loss(
    self,
    embeddings: Embeddings,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    *,
    projections: Projections | None = None,
    factor: Float[Array, ""] | float = 1.0,
  ) -> tuple[Float[Array, ""], Metrics]:
    """The local terms of a batch, or one part's share of them, and their metrics.

    Args:
      embeddings: of images and texts.
      batch: the pairs; without targets the terms that distil are left out.
      counts: of the whole batch.
      projections: of the terms that have any.
      factor: multiplies the weights of the terms that distil.
    """
    total, metrics = jnp.float32(0), {}
    for name, (weight, term) in self.local_terms.items():
      if term.distils and batch.targets is None:
        continue
      value = term.total(embeddings, batch, projections or {}) / counts[name]
      total = total + weight * (factor if term.distils else 1.0) * value
      metrics[f"loss_{name}"] = value
    return total, metrics

  @property
  def _several(self) -> bool:
    return len(self.global_terms) + len(self.local_terms) + len(self.distillation_terms) > 1


def make_objective(
  weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]], dtype: str = "float32"
) -> Objective:
  """The weighted sum of named terms.

  Args:
    weights: name of a loss in `losses.OBJECTIVES` or `losses.DISTILLATIONS` or of a local term -> its weight.
    options: keyword arguments of each term, by its name.
    dtype: see `Objective`.

  Raises:
    UserError: for an unknown term, a weight that is not above 0, an option that its term does not take or refuses, or
      no contrastive loss at all.
  """
  for name, weight in weights.items():
    if name not in _TERMS:
      raise UserError(f"the objective has no term '{name}'{nearest(name, _TERMS)}: choose from {', '.join(_TERMS)}")
    if not weight > 0:
      raise UserError(f"objective.{name}={weight} must be above 0: leave the term out to switch it off")
  if not any(name in losses.OBJECTIVES for name in weights):
    raise UserError(
      f"the objective {', '.join(weights)} has no term that keeps embeddings apart: add one of"
      f" {', '.join(losses.OBJECTIVES)}"
    )

  def chosen(terms, bind):
    return {name: (weight, bind(name, options.get(name, {}))) for name, weight in weights.items() if name in terms}

  return Objective(
    chosen(losses.OBJECTIVES, _bind_loss),
    chosen(LOCAL_TERMS, _bind_local),
    dtype,
    chosen(losses.DISTILLATIONS, _bind_loss),
  )


def check_options(options: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises a `UserError` for a value that a term refuses, whether or not the objective has that term.

  Args:
    options: keyword arguments of terms, by the name of the term.
  """
  for name, given in options.items():
    (_bind_local if name in LOCAL_TERMS else _bind_loss)(name, given)


def check_teacher(objective: Objective, *, teacher: str, targets: str) -> None:
  """Raises a `UserError` unless there are targets for the terms that distil, and terms for the targets.

  Args:
    objective: of the run.
    teacher: `distillation.teacher`, a run, or empty.
    targets: `distillation.targets`, a cache, or empty.
  """
  if teacher and targets:
    raise UserError(
      f"distillation.teacher={teacher} and distillation.targets={targets} both give targets: empty one of them"
    )
  if objective.distils and not (teacher or targets):
    raise UserError(
      "the objective has a distillation term but no teacher: name a run in distillation.teacher or a cache in"
      " distillation.targets"
    )
  if (teacher or targets) and not objective.distils:
    field, value = ("teacher", teacher) if teacher else ("targets", targets)
    raise UserError(
      f"distillation.{field}={value} has no use: add distill_features, distill_similarity or distill_relational to the"
      " objective"
    )
  if targets and objective.needs_teacher_text:
    raise UserError(NO_TEACHER_TEXT)


def term_names() -> tuple[str, ...]:
  """Names of all terms that an objective may weigh."""
  return tuple(_TERMS)


def term_options() -> dict[str, dict[str, inspect.Parameter]]:
  """Name of every term that has options -> what `loss_options` may say of it."""
  terms = {name: _options(function) for name, function in _TERMS.items()}
  return {name: options for name, options in terms.items() if options}


def _options(function: Callable) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(function).parameters
  return {name: parameter for name, parameter in parameters.items() if name not in _SUPPLIED}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
  allowed = _options(_TERMS[name])
  for option in options:
    if option not in allowed:
      known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
      raise UserError(f"loss_options.{name}.{option} is not an option of '{name}'{nearest(option, allowed)}: {known}")


def _bind_loss(name: str, options: Mapping[str, Any]) -> Callable:
  """The global term called `name` with its options."""
  _check_options(name, options)
  contrastive = name in losses.OBJECTIVES
  bound = functools.partial(_TERMS[name], **options)
  # Tracing it on two pairs finds values that it refuses now, not when the whole step is compiled.
  pair = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  supplied = {"logit_scale": 1.0, "logit_bias": 0.0} if contrastive else {"logit_scale": 1.0}
  jax.eval_shape(lambda *embeddings: bound(*embeddings, **supplied), *[pair] * (2 if contrastive else 4))
  return bound


def _bind_local(name: str, options: Mapping[str, Any]) -> LocalTerm:
  """The local term called `name` with its options."""
  _check_options(name, options)
  return LOCAL_TERMS[name](**options)
