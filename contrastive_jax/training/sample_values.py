"""What the terms of an objective keep of samples, brought to the host to be looked at."""

import jax
import numpy as np
from jaxtyping import Float

from contrastive_jax.parallel.mesh import replicated
from contrastive_jax.training.state import StateSpec, TrainState

# Samples that are looked at: enough for a histogram, and little to send.
MOST = 1 << 16


def sample_values(spec: StateSpec, state: TrainState, most: int = MOST) -> dict[str, Float[np.ndarray, "_"]]:
  """Returns numbers of samples by what they are, of those that have been seen, evenly spread over all rows.

  Args:
    spec: the objective and the mesh that the state lies on.
    state: the state. All processes call this together, since each holds a part of it.
    most: the largest number of rows that are looked at.
  """
  objective = spec.objective
  if objective is None or state.objective is None or not jax.eval_shape(objective.sample_values, state.objective):
    return {}

  def some(remembered):
    return {what: rows[:: -(-len(rows) // most)] for what, rows in objective.sample_values(remembered).items()}

  found = jax.device_get(jax.jit(some, out_shardings=replicated(spec.mesh))(state.objective))
  return {what: values[np.isfinite(values)] for what, values in found.items()}
