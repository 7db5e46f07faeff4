"""The term that compares how similar the student and its teacher find the images of a batch to each other."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.objectives.term import TEACHER_IMAGE, GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRelational(GlobalTerm):
  """The mean squared difference of image-image similarities from the teacher's (`losses.relational_distillation`).

  Attributes:
    strategy: "ring" passes blocks of images around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
  """

  strategy: str = "ring"
  tile: int | None = within(COUNT, None)

  needs: ClassVar[frozenset[str]] = frozenset({TEACHER_IMAGE})
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    options = dataclasses.asdict(self) | exchange
    loss, metrics = losses.relational_distillation(pairs.image, pairs.text, pairs.teacher_image, **options)
    return loss, state, metrics
