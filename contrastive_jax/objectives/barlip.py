"""The term of the correlations between the features of images and of texts."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import NOT_NEGATIVE, within
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Barlip(ComparesTowers, GlobalTerm):
  """How far the correlations of image and text features are from the identity (`losses.cross_correlation_loss`).

  Its authors add it to a softmax loss with a weight of 0.025.

  Attributes:
    off_diagonal: weight of the correlations between different features.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  off_diagonal: float = within(NOT_NEGATIVE, 0.005)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, *, axis_name=None, **exchange: Any):
    loss = functools.partial(losses.cross_correlation_loss, off_diagonal=self.off_diagonal, axis_name=axis_name)
    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
