"""The multiplier of similarities that a term with a temperature of its own takes."""

from jax import lax

from contrastive_jax.batch import AnyArray
from contrastive_jax.objectives.term import Pairs


def scale_of(pairs: Pairs, temperature: float | None, *, constant: bool = False) -> AnyArray:
  """Returns `1 / temperature`, or the model's logit scale where the temperature is None.

  Args:
    pairs: the pairs, which carry the model's logit scale.
    temperature: the temperature of the term, or None.
    constant: whether the model's scale must not be learned from the term, as for losses without a lower bound in it.
  """
  if temperature is not None:
    return 1 / temperature
  return lax.stop_gradient(pairs.logit_scale) if constant else pairs.logit_scale
