"""The term of a softmax loss with a temperature for every image and every text."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.bounds import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, Range, within
from contrastive_jax.errors import UserError
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.individual_temperatures import Samples, individual_temperature_loss
from contrastive_jax.objectives import samples, steps
from contrastive_jax.objectives.term import SAMPLES, STATE_ROWS, Arrays, GlobalTerm, Pairs, Sizes, Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndividualTemperatures(GlobalTerm):
  """The softmax loss with a temperature for every image and every text (`losses.individual_temperature_loss`).

  The model's logit scale has no part in it. The state is 28 bytes a sample, split over all devices.

  Attributes:
    gamma: weight of the batch in the running means, in (0, 1].
    gamma_steps: number of steps over which the weight falls from 1 to `gamma` along half a cosine; 0 is `gamma` from
      the start.
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
  gamma_steps: int = within(NOT_NEGATIVE, 0)
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
    rows = samples.rows_of("individual_temperatures", self.samples, sizes)

    def filled(value, dtype=jnp.float32):
      return Variable((rows,), (SAMPLES,), lambda _, shape: jnp.full(shape, value, dtype))

    side = {"log_mean": filled(0), "temperature": filled(self.temperature), "momentum": filled(0)}
    return {"image": side, "text": side, "seen": filled(0, jnp.int32), **steps.variables(self.gamma_steps)}

  def sample_values(self, state: Arrays) -> dict[str, Float[Array, "rows"]]:
    seen = state["seen"] > 0
    return {
      f"Temperatures of {name}": jnp.where(seen, state[side]["temperature"], jnp.nan)
      for side, name in (("image", "images"), ("text", "texts"))
    }

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    remembered = {name: state[name] for name in ("image", "text", "seen")}
    before = samples.read(remembered, pairs.state_rows, axes)
    loss, sides, metrics = individual_temperature_loss(
      pairs.image,
      pairs.text,
      Samples(**before["image"]),
      Samples(**before["text"]),
      before["seen"],
      gamma=steps.falling(self.gamma, state, self.gamma_steps),
      group=pairs.keys,
      **{name: getattr(self, name) for name in _OF_THE_LOSS},
      **exchange,
    )
    image, text = (dataclasses.asdict(side) for side in sides)
    after = {"image": image, "text": text, "seen": before["seen"] + 1}
    written = samples.write(remembered, pairs.state_rows, jax.lax.stop_gradient(after), axes)
    return loss, {**written, **steps.counted(state, self.gamma_steps)}, metrics


_OF_THE_LOSS = ("rho", "rate", "momentum", "smallest", "largest", "strategy", "tile")
