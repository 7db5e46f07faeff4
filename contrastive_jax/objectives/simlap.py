"""The term in which two arbitrary images are alike, in features that their captions choose."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, within
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.reductions import gathered
from contrastive_jax.objectives import draws, perceptron
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import Arrays, ComparesTowers, GlobalTerm, Pairs, Sizes, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimLAP(ComparesTowers, GlobalTerm):
  """A softmax loss of each image and another one of the batch, in gated features (`losses.gated_pairs_loss`).

  The gates are made of the mean of both captions' embeddings, by a layer, a rectifier, a layer and a sigmoid, which are
  only needed to train. The authors have a learned vector for each class where captions are here; these are constants.
  Which images meet follows from the pairs of the batch, on every mesh alike. It does not compare the towers, and stands
  beside a loss that does.

  Attributes:
    hidden: number of features between the layers; None is twice that of the embeddings.
    temperature: divisor of the similarities; None takes that of the model, which is then trained too.
    strategy: "gather" holds the images of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the first is the one whose embeddings are compared; gates are made of those of each other one, in a sum of
      losses.

  arXiv 2410.18200, without the batch norm of its gates, which would make a pair depend on the others.
  """

  hidden: int | None = within(COUNT, None)
  temperature: float | None = within(POSITIVE, 0.1)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  compares_pairs: ClassVar[bool] = True

  def params(self, sizes: Sizes) -> Arrays:
    dim = sizes.embed_dim
    return perceptron.variables((dim, self.hidden or 2 * dim, dim))

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    key = draws.batch_key(pairs, axes)

    def draw(count):
      """Puts all pairs in one circle: the partner of each is the next one."""
      order = jax.random.permutation(key, count)
      return order[(jnp.argsort(order) + 1) % count]

    partners = draws.of_pairs(draw, pairs, axes)

    def loss(first, second):
      captions = jax.lax.stop_gradient(second).astype(jnp.float32)
      both = (captions + gathered(captions, axes)[partners]) / 2
      return losses.gated_pairs_loss(
        first,
        jax.nn.sigmoid(perceptron.apply(params, both)),
        partners,
        logit_scale=scale_of(pairs, self.temperature),
        group=pairs.keys,
        strategy=self.strategy,
        tile=self.tile,
        **exchange,
      )

    value, metrics = against_first(pairs, self.towers, loss)
    return value, state, metrics
