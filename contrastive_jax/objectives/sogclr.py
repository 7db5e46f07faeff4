"""The term of a softmax loss whose denominators are running means over all steps, at one temperature."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from contrastive_jax.bounds import COUNT, NOT_NEGATIVE, POSITIVE, Range, within
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.individual_temperatures import Samples, individual_temperature_loss
from contrastive_jax.objectives import samples, steps
from contrastive_jax.objectives.term import SAMPLES, STATE_ROWS, Arrays, GlobalTerm, Pairs, Sizes, Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sogclr(GlobalTerm):
  """The softmax loss whose mean over negatives is a running one for every image and every text of the data.

  Its gradient is nearly that of a batch as large as the data, whatever the batch size. It is
  `losses.individual_temperature_loss` with one temperature that never changes, and without the constant that this adds.
  The model's logit scale has no part in it. The state is 12 bytes a sample, split over all devices.

  Attributes:
    gamma: weight of the batch in the running means, in (0, 1].
    gamma_steps: number of steps over which the weight falls from 1 to `gamma` along half a cosine, as in FastCLIP
      (arXiv 2407.01445); 0 is `gamma` from the start.
    temperature: divisor of the similarities.
    samples: number of rows of the state; None counts the samples of the run's sources.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.

  Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm Performance"
  (arXiv 2202.12387), algorithm 1 in both directions.
  """

  gamma: float = within(Range(0, 1, above=True), 0.8)
  gamma_steps: int = within(NOT_NEGATIVE, 0)
  temperature: float = within(POSITIVE, 0.07)
  samples: int | None = within(COUNT, None)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  needs: ClassVar[frozenset[str]] = frozenset({STATE_ROWS})
  separates: ClassVar[bool] = True
  compares_pairs: ClassVar[bool] = True

  def state(self, sizes: Sizes) -> Arrays:
    rows = samples.rows_of("sogclr", self.samples, sizes)

    def zeros(dtype=jnp.float32):
      return Variable((rows,), (SAMPLES,), lambda _, shape: jnp.zeros(shape, dtype))

    return {"image": zeros(), "text": zeros(), "seen": zeros(jnp.int32), **steps.variables(self.gamma_steps)}

  def __call__(self, pairs: Pairs, params, state, **exchange: Any):
    axes = pairwise.mesh_axes(exchange["axis_name"])
    remembered = {name: state[name] for name in ("image", "text", "seen")}
    before = samples.read(remembered, pairs.state_rows, axes)
    fixed, zeros = jnp.full_like(before["image"], self.temperature), jnp.zeros_like(before["image"])
    loss, (image, text), _ = individual_temperature_loss(
      pairs.image,
      pairs.text,
      Samples(before["image"], fixed, zeros),
      Samples(before["text"], fixed, zeros),
      before["seen"],
      gamma=steps.falling(self.gamma, state, self.gamma_steps),
      rho=0.0,
      group=pairs.keys,
      strategy=self.strategy,
      tile=self.tile,
      **exchange,
    )
    after = {"image": image.log_mean, "text": text.log_mean, "seen": before["seen"] + 1}
    written = samples.write(remembered, pairs.state_rows, jax.lax.stop_gradient(after), axes)
    return loss, {**written, **steps.counted(state, self.gamma_steps)}, {}
