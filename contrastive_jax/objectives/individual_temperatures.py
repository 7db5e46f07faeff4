"""The term of a softmax loss with a temperature for every image and every text."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax.bounds import COUNT, FINITE, POSITIVE, Range, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.individual_temperatures import Samples, individual_temperature_loss
from contrastive_jax.objectives import samples
from contrastive_jax.objectives.term import SAMPLES, STATE_ROWS, Arrays, GlobalTerm, Pairs, Sizes, Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndividualTemperatures(GlobalTerm):
  """The softmax loss with a temperature for every image and every text (`losses.individual_temperature_loss`).

  The model's logit scale has no part in it. The state is 28 bytes a sample, split over all devices.

  Attributes:
    gamma: weight of the batch in the running means, in (0, 1].
    rho: weight of the temperatures; the larger it is, the smaller they become.
    temperature: the temperature that all samples begin with.
    smallest: the smallest temperature.
    largest: the largest temperature.
    rate: learning rate of the temperatures.
    momentum: weight of the newest derivative in its running mean, in (0, 1].
    samples: number of rows of the state; None counts the samples of the run's sources.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.

  The defaults are those of the authors' script for CC3M.
  """

  gamma: float = within(Range(0, 1, above=True), 0.8)
  rho: float = within(FINITE, 6.0)
  temperature: float = within(POSITIVE, 0.01)
  smallest: float = within(POSITIVE, 0.005)
  largest: float = within(POSITIVE, 1.0)
  rate: float = within(POSITIVE, 0.03)
  momentum: float = within(Range(0, 1, above=True), 0.9)
  samples: int | None = within(COUNT, None)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  needs: ClassVar[frozenset[str]] = frozenset({STATE_ROWS})
  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def __post_init__(self):
    if not self.smallest <= self.temperature <= self.largest:
      raise UserError(
        f"temperature={self.temperature} is not between smallest={self.smallest} and largest={self.largest}"
      )

  def state(self, sizes: Sizes) -> Arrays:
    if self.samples is not None and self.samples < sizes.samples:
      raise UserError(
        f"loss_options.individual_temperatures.samples={self.samples} is less than the {sizes.samples} samples of the"
        " sources: raise it, or leave it out"
      )
    if not (self.samples or sizes.samples):
      raise UserError(
        "individual_temperatures keeps a state for every sample, and nothing says how many there are: set"
        " loss_options.individual_temperatures.samples"
      )
    rows = samples.row_count(self.samples or sizes.samples)

    def filled(value, dtype=jnp.float32):
      return Variable((rows,), (SAMPLES,), lambda _, shape: jnp.full(shape, value, dtype))

    side = {"log_mean": filled(0), "temperature": filled(self.temperature), "momentum": filled(0)}
    return {"image": side, "text": side, "seen": filled(0, jnp.int32)}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    before = samples.read(state, pairs.state_rows, axes)
    loss, sides, metrics = individual_temperature_loss(
      pairs.image,
      pairs.text,
      Samples(**before["image"]),
      Samples(**before["text"]),
      before["seen"],
      group=pairs.keys,
      **{name: getattr(self, name) for name in _OF_THE_LOSS},
      **exchange,
    )
    image, text = (dataclasses.asdict(side) for side in sides)
    after = {"image": image, "text": text, "seen": before["seen"] + 1}
    return loss, samples.write(state, pairs.state_rows, jax.lax.stop_gradient(after), axes), metrics


_OF_THE_LOSS = ("gamma", "rho", "rate", "momentum", "smallest", "largest", "strategy", "tile")
