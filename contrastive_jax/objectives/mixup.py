"""The terms of mixed embeddings and of soft targets, which M3CoL trains with one after the other."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, POSITIVE, Range, within
from contrastive_jax.losses import pairwise
from contrastive_jax.objectives import draws
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup(ComparesTowers, GlobalTerm):
  """The softmax loss of mixed images and that of mixed texts, Mixup-NCE, in a sum (`losses.mixup_loss`).

  What is mixed follows from the pairs of the batch, on every mesh alike.

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which is then trained too.
    mixed: share of the embeddings of each side that are mixed with another one.
    concentration: both parameters of the Beta distribution that shares are drawn from.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  temperature: float | None = within(POSITIVE, 0.1)
  mixed: float = within(Range(0, 1), 0.5)
  concentration: float = within(POSITIVE, 0.15)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])

    def draw(key, count):
      order, chosen, share = jax.random.split(key, 3)
      mixed = jax.random.uniform(chosen, (count,)) < self.mixed
      shares = jax.random.beta(share, self.concentration, self.concentration, (count,))
      return jax.random.permutation(order, count), jnp.where(mixed, shares, 1)

    keys = jax.random.split(draws.batch_key(pairs, axes))
    of_first, of_second = (draws.of_pairs(functools.partial(draw, key), pairs, axes) for key in keys)
    loss = functools.partial(
      losses.mixup_loss,
      logit_scale=scale_of(pairs, self.temperature),
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )

    def both(first, second):
      mixed_first, _ = loss(first, second, *of_first)
      mixed_second, _ = loss(second, first, *of_second)
      return mixed_first + mixed_second, {"loss_mixed_first": mixed_first, "loss_mixed_second": mixed_second}

    value, metrics = against_first(pairs, self.towers, both)
    return value, state, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCLIP(ComparesTowers, GlobalTerm):
  """The softmax loss with targets from the texts, and that with targets from the images (`losses.soft_target_loss`).

  Attributes:
    temperature: divisor of the similarities; None takes that of the model, which is then trained too.
    target_temperature: divisor of the similarities within one side, whose softmax is the target.
    through_targets: whether gradients flow through the targets, as in the authors' code.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  temperature: float | None = within(POSITIVE, 0.125)
  target_temperature: float = within(POSITIVE, 0.125)
  through_targets: bool = True
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    loss = functools.partial(
      losses.soft_target_loss,
      logit_scale=scale_of(pairs, self.temperature),
      target_temperature=self.target_temperature,
      through_targets=self.through_targets,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )

    def both(first, second):
      (of_second, _), (of_first, _) = loss(first, second), loss(second, first)
      return of_first + of_second, {"loss_targets_of_first": of_first, "loss_targets_of_second": of_second}

    value, metrics = against_first(pairs, self.towers, both)
    return value, state, metrics
