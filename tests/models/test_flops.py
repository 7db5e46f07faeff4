import jax
import numpy as np
import pytest

from contrastive_jax.models import dual_encoder
from contrastive_jax.models.flops import forward_flops_per_pair


def _matrix_flops(jaxpr):
  """2 m n k of every matrix product in a traced program, loops counted as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
      total += 2 * inner * np.prod(equation.outvars[0].aval.shape)
    for value in equation.params.values():
      if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        total += equation.params.get("length", 1) * _matrix_flops(getattr(value, "jaxpr", value))
  return total


@pytest.mark.parametrize(
  ("preset", "transformer"),
  [("clip_b32", {}), ("siglip_b16", {"activation": "swiglu", "depth": 3}), ("univitar_0.3b", {})],
)
def test_flops_are_those_of_the_traced_program(preset, transformer, tiny, images, captions, encoder):
  config = tiny(preset, transformer=transformer)
  _, params = dual_encoder.abstract(config)
  pairs = 5
  traced = jax.make_jaxpr(encoder(config))(params, images([(3, 3)] * pairs), *captions([7] * pairs))
  queries = 2 * 16**2 * [config.image.pool, config.text.pool].count("map")  # Once a batch.
  assert _matrix_flops(traced.jaxpr) == pairs * forward_flops_per_pair(config) + queries
