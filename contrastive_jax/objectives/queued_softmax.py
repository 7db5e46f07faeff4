"""The term of a softmax loss with further negatives that are kept from earlier steps."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.queue import Queue
from contrastive_jax.objectives import ring, steps
from contrastive_jax.objectives.term import Arrays, GlobalTerm, Pairs, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueuedSoftmax(GlobalTerm):
  """The softmax loss with the embeddings of earlier pairs as further negatives (`losses.queued_softmax_loss`).

  The queue was made by towers of earlier steps. The faster they learn, the fewer steps it should go back, unless
  `average` makes it of towers that change slowly.

  Attributes:
    size: number of earlier pairs, at least those of a batch and a multiple of the number of devices. They are kept from
      one step to the next, in 8 bytes for each feature of the embeddings, split over all devices. With `average` it may
      be 0, which is no queue.
    average: whether images and texts are compared with what the moving average of the towers makes of the others, in
      the batch and in the queue, so that a longer queue is nearly of one tower. It needs an `average_decay`.
    soft_share: share of the targets that the moving average gives, by the softmax of its own similarities; the rest is
      on the pair. It needs `average`.
    soft_steps: number of steps over which that share rises from 0 along a line; 0 is `soft_share` from the start.
    target_temperature: divisor of the similarities of the average in its softmax; None takes `1 / logit_scale`.
    strategy: "gather" holds the texts of all devices, and the whole queue; "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.

  MoCo (arXiv 1911.05722) across the towers. With soft targets it is momentum distillation as in ALBEF (arXiv
  2107.07651), which had a `soft_share` of 0.4; MSD (arXiv 2512.02438) names the same without its formula.
  """

  size: int = within(NOT_NEGATIVE, 4096)
  average: bool = False
  soft_share: float = within(SHARE, 0.0)
  soft_steps: int = within(NOT_NEGATIVE, 0)
  target_temperature: float | None = within(POSITIVE, None)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True

  def __post_init__(self):
    if not self.average and not self.size:
      raise UserError("size=0 leaves the softmax loss: set loss to softmax, raise size, or set average=True")
    if not self.average and self.soft_share:
      raise UserError(f"soft_share={self.soft_share} is a share of the average's targets: set average=True")
    if not self.soft_share and (self.soft_steps or self.target_temperature is not None):
      raise UserError(
        f"soft_steps={self.soft_steps} and target_temperature={self.target_temperature} are of targets that"
        " soft_share=0 leaves out: raise it, or leave them out"
      )

  @property
  def uses_average(self) -> bool:
    return self.average

  def state(self, sizes: Sizes) -> Arrays:
    queue = ring.variables(self.size, sizes, "loss_options.queued_softmax.size") if self.size else {}
    return {**queue, **steps.variables(self.soft_steps)}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    made = (pairs.average_image, pairs.average_text) if self.average else (pairs.image, pairs.text)
    share = steps.rising(self.soft_share, state, self.soft_steps)
    loss, metrics = losses.queued_softmax_loss(
      pairs.image,
      pairs.text,
      Queue(state["image"], state["text"], state["keys"], ring.valid(state, axes)) if self.size else None,
      logit_scale=pairs.logit_scale,
      group=pairs.keys,
      average=made if self.average else None,
      soft_share=share if self.soft_share else None,
      target_temperature=self.target_temperature,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    after = ring.push(state, *made, pairs.keys, axes) if self.size else {}
    metrics |= {"soft_share": share} if self.soft_steps else {}
    return loss, {**after, **steps.counted(state, self.soft_steps)}, metrics
