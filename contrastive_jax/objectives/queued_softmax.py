"""The term of a softmax loss with further negatives that are kept from earlier steps."""

import dataclasses
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.queue import Queue
from contrastive_jax.objectives import ring
from contrastive_jax.objectives.term import Arrays, GlobalTerm, Pairs, Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueuedSoftmax(GlobalTerm):
  """The softmax loss with the embeddings of earlier pairs as further negatives (`losses.queued_softmax_loss`).

  The queue was made by towers of earlier steps. The faster they learn, the fewer steps it should go back, unless
  `average` makes it of towers that change slowly.

  Attributes:
    size: number of earlier pairs, at least those of a batch and a multiple of the number of devices. They are kept from
      one step to the next, in 8 bytes for each feature of the embeddings, split over all devices.
    average: whether images and texts are compared with what the moving average of the towers makes of the others, in
      the batch and in the queue, so that a longer queue is nearly of one tower. It needs an `average_decay`.
    strategy: "gather" holds the texts of all devices, and the whole queue; "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
  """

  size: int = within(COUNT, 4096)
  average: bool = False
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True

  @property
  def uses_average(self) -> bool:
    return self.average

  def state(self, sizes: Sizes) -> Arrays:
    return ring.variables(self.size, sizes, "loss_options.queued_softmax.size")

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    made = (pairs.average_image, pairs.average_text) if self.average else (pairs.image, pairs.text)
    loss, metrics = losses.queued_softmax_loss(
      pairs.image,
      pairs.text,
      Queue(state["image"], state["text"], state["keys"], ring.valid(state, axes)),
      logit_scale=pairs.logit_scale,
      group=pairs.keys,
      average=made if self.average else None,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    return loss, ring.push(state, *made, pairs.keys, axes), metrics
