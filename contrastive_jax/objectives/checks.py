"""Checks an objective against the towers, the sources and the teacher of a run."""

from collections.abc import Iterable, Mapping, Sequence

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.objectives.objective import Objective
from contrastive_jax.objectives.table import TERMS
from contrastive_jax.objectives.term import TEACHER_TEXT


def check_towers(objective: Objective, towers: Sequence[str]) -> None:
  """Raises a `UserError` where a term reads a tower that the model lacks, or no term reads one that it has.

  Args:
    objective: the objective of the run.
    towers: the names of the towers of the model.
  """
  for name, (_, term) in objective.terms.items():
    for tower in term.towers:
      require_known(f"loss_options.{name}.towers", tower, towers)
  read = {tower for _, term in objective.terms.values() for tower in term.towers}
  for tower in towers:
    if tower not in read:
      raise UserError(
        f"no term of the objective reads the {tower} tower, which would never learn: add it to the towers of a term,"
        " such as loss_options.sigmoid.towers, or leave it out of the model"
      )


def present_in(
  objective: Objective, sources: Iterable[str], kept: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
  """Returns the sources whose pairs take part in a term, by the names of the terms that some are kept from.

  Args:
    objective: the objective of the run.
    sources: the names of all sources of the run.
    kept: the terms that a source names in its option `terms`; the others take part in all.

  Raises:
    UserError: for a term that the objective does not have or no source takes part in, or that cannot leave pairs out.
  """
  for source, names in kept.items():
    if not names:
      raise UserError(
        f"data.sources gives {source!r} no terms: name some of {', '.join(objective.terms)}, or leave it out"
      )
    for name in names:
      require_known(f"data.sources gives {source!r} terms, of which one", name, objective.terms)
  found = {}
  for name, (_, term) in objective.terms.items():
    taking = tuple(source for source in sources if name in kept.get(source, objective.terms))
    out = [source for source in sources if source not in taking]
    if not taking:
      raise UserError(f"no source takes part in the term {name}: add it to the terms of one of data.sources")
    if out and not term.leaves_out:
      able = ", ".join(sorted(other for other, kind in TERMS.items() if kind().leaves_out))
      raise UserError(
        f"data.sources keeps {out[0]!r} from {name}, which sees all pairs of a batch: add {name} to its terms. Those"
        f" that can leave pairs out, at their defaults, are {able}"
      )
    if out:
      found[name] = taking
  return found


def check_teacher(objective: Objective, *, teacher: str, targets: str) -> None:
  """Raises a `UserError` unless there are targets for the terms that distil, and terms for the targets.

  Args:
    objective: the objective of the run.
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
    some = [name for name, term in TERMS.items() if term().distils]
    terms = f"{', '.join(some[:-1])} or {some[-1]}"
    raise UserError(f"distillation.{field}={value} has no use: add {terms} to the objective")
  if targets and objective.needs(TEACHER_TEXT):
    raise UserError(objective.no_teacher_text())
