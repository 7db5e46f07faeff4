"""The term that compares how the student and its teacher distribute each image over the texts of the batch."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.objectives.term import TEACHER_IMAGE, TEACHER_TEXT, GlobalTerm, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSimilarity(GlobalTerm):
  """The KL divergence from the teacher's to the student's softmax over the batch (`losses.similarity_distillation`).

  Attributes:
    temperature: divisor of the student's similarities; None takes `1 / logit_scale`, which is then trained too.
    teacher_temperature: divisor of the teacher's similarities.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  temperature: float | None = within(POSITIVE, None)
  teacher_temperature: float = within(POSITIVE, 0.05)
  strategy: str = "ring"
  tile: int | None = within(COUNT, None)

  needs: ClassVar[frozenset[str]] = frozenset({TEACHER_IMAGE, TEACHER_TEXT})
  compares_pairs: ClassVar[bool] = True

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
