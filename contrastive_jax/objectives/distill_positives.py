"""The term that draws replayed pairs to where a teacher had them, away from what the student makes of others."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.errors import UserError
from contrastive_jax.objectives.term import REPLAYED, TEACHER_IMAGE, TEACHER_TEXT, Arrays, GlobalTerm, Pairs, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillPositives(GlobalTerm):
  """The softmax loss with the teacher's embeddings as positives (`losses.positive_distillation`).

  Only pairs of the sources in `distillation.replay` count, or all where it is empty; all are negatives. It keeps what
  an earlier model knew while the present one, which began from it, learns from further sources.

  COCONUT (arXiv 2310.02699).

  Attributes:
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  needs: ClassVar[frozenset[str]] = frozenset({TEACHER_IMAGE, TEACHER_TEXT, REPLAYED})
  compares_pairs: ClassVar[bool] = True

  def params(self, sizes: Sizes) -> Arrays:
    if sizes.teacher_dim is not None and sizes.teacher_dim != sizes.embed_dim:
      raise UserError(
        "objective.distill_positives puts the teacher's embeddings among the model's: that of distillation.teacher has"
        f" {sizes.teacher_dim} features, and model.embed_dim={sizes.embed_dim}; name the run that the model begins from"
      )
    return {}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss, metrics = losses.positive_distillation(
      pairs.image,
      pairs.text,
      pairs.teacher_image,
      pairs.teacher_text,
      logit_scale=pairs.logit_scale,
      pair_weights=pairs.replayed,
      group=pairs.keys,
      **dataclasses.asdict(self),
      **exchange,
    )
    return loss, state, metrics
