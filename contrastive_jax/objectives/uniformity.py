"""The terms that spread embeddings over the sphere, within each tower and between two."""

import dataclasses
import functools
from typing import Any, ClassVar

from contrastive_jax import losses
from contrastive_jax.bounds import COUNT, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses.spread import SHARPNESS
from contrastive_jax.objectives.term import ComparesTowers, GlobalTerm, Pairs, against_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniformity(GlobalTerm):
  """How evenly each tower's embeddings spread, the mean over the towers (`losses.uniformity`).

  Attributes:
    t: sharpness of the kernel.
    strategy: "ring" passes blocks of embeddings around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    towers: the towers whose embeddings are spread.
  """

  t: float = within(SHARPNESS, 2.0)
  strategy: str = "ring"
  tile: int | None = within(COUNT, None)
  towers: tuple[str, ...] = ("image", "text")

  compares_pairs: ClassVar[bool] = True

  def __post_init__(self):
    if not self.towers or len(set(self.towers)) < len(self.towers):
      raise UserError(f"towers={self.towers} must name at least one tower, and each once")

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    options = {"t": self.t, "group": pairs.keys, "strategy": self.strategy, "tile": self.tile}
    values = {tower: losses.uniformity(pairs.of(tower), **options, **exchange)[0] for tower in self.towers}
    return (
      sum(values.values()) / len(values),
      state,
      {f"uniformity_{tower}": value for tower, value in values.items()},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossUniformity(ComparesTowers, GlobalTerm):
  """How evenly images and texts of different pairs spread around each other (`losses.cross_uniformity`).

  Attributes:
    t: sharpness of the kernel.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    towers: the towers that are compared: the first with each other one, in a sum of losses.
  """

  t: float = within(SHARPNESS, 2.0)
  strategy: str = "ring"
  tile: int | None = within(COUNT, None)

  compares_pairs: ClassVar[bool] = True

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    options = {"t": self.t, "group": pairs.keys, "strategy": self.strategy, "tile": self.tile}
    value, metrics = against_first(
      pairs, self.towers, functools.partial(losses.cross_uniformity, **options, **exchange)
    )
    return value, state, metrics
