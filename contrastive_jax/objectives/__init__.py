"""Objectives: terms that own their options, their parameters and their state, and their weighted sum."""

from contrastive_jax.objectives.checks import check_teacher, check_towers, present_in
from contrastive_jax.objectives.objective import Objective, make_objective, term_options
from contrastive_jax.objectives.table import TERMS
from contrastive_jax.objectives.term import GlobalTerm, LocalTerm, Pairs, Sizes, Term, Variable

__all__ = [
  "TERMS",
  "GlobalTerm",
  "LocalTerm",
  "Objective",
  "Pairs",
  "Sizes",
  "Term",
  "Variable",
  "check_teacher",
  "check_towers",
  "make_objective",
  "present_in",
  "term_options",
]
