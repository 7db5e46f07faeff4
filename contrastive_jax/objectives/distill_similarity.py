"""How a teacher distributes each image over the texts of the batch, as a term."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.objectives.term import TEACHER_IMAGE, TEACHER_TEXT, GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSimilarity(GlobalTerm):
  """KL divergence from the teacher's to the student's softmax over the batch, see `losses.similarity_distillation`.

  Attributes:
    temperature: the student's similarities are divided by it; None takes `1 / logit_scale`, which is then trained too.
    teacher_temperature: the teacher's similarities are divided by it.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  temperature: float | None = None
  teacher_temperature: float = 0.05
  strategy: str = "ring"
  tile: int | None = None

  needs: ClassVar[frozenset[str]] = frozenset({TEACHER_IMAGE, TEACHER_TEXT})

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.similarity_distillation(
      pairs.image,
      pairs.text,
      pairs.teacher_image,
      pairs.teacher_text,
      logit_scale=pairs.logit_scale,
      **dataclasses.asdict(self),
      **exchange,
    )
    return loss, state, metrics
