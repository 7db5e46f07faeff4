"""What a run minimises: one loss or a weighted sum of terms, each global or local.

A global term sees the embeddings of the whole batch at once. A local term is a sum over pairs that do not see each
other, divided by a count known from the batch alone, so that micro-batches can add it up.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from contrastive_jax import losses
from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.parallel.mesh import BATCH_AXES, ring_order

Metrics = dict[str, jax.Array]
Embeddings = tuple[Float[Array, "pairs dim"], Float[Array, "pairs dim"]]
_SUPPLIED = ("image", "text", "logit_scale", "logit_bias", "group", "axis_name", "ring_order")


@dataclasses.dataclass(frozen=True)
class LocalTerm:
  """A sum over pairs divided by a count.

  Attributes:
    total: of the (image, text) embeddings of some pairs and their part of the batch.
    count: of a batch; counts of its parts add up to it.
  """

  total: Callable[[Embeddings, Batch], Float[Array, ""]]
  count: Callable[[Batch], Float[Array, ""]]


def _pairs(batch: Batch) -> Float[Array, ""]:
  return jnp.float32(batch.text.tokens.shape[0])


LOCAL_TERMS = {
  "alignment": LocalTerm(lambda embeddings, batch: jnp.sum(losses.squared_distances(*embeddings)), _pairs),
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """A weighted sum of terms.

  Attributes:
    global_terms: name -> (weight, loss on local shards; see `losses`).
    local_terms: name -> (weight, term).
    dtype: of the embeddings that global terms exchange and multiply; their logits and sums are float32.
  """

  global_terms: Mapping[str, tuple[float, Callable]]
  local_terms: Mapping[str, tuple[float, LocalTerm]] = dataclasses.field(default_factory=dict)
  dtype: str = "float32"

  def global_loss(
    self,
    embeddings: Embeddings,
    group: Int[Array, "pairs"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None,
    mesh: Mesh,
  ) -> tuple[Float[Array, ""], Metrics]:
    """The global terms of embeddings that lie on the batch axes of `mesh`, and their metrics."""
    order = ring_order(mesh)

    def local(image, text, group, logit_scale, logit_bias):
      total, metrics = jnp.float32(0), {}
      for name, (weight, loss) in self.global_terms.items():
        value, parts = loss(
          image,
          text,
          logit_scale=logit_scale,
          logit_bias=logit_bias,
          group=group,
          axis_name=BATCH_AXES,
          ring_order=order,
        )
        total = total + weight * value
        metrics |= parts | ({f"loss_{name}": value} if self._several else {})
      return total, metrics

    pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      local, mesh=mesh, in_specs=(pairs, pairs, pairs, everywhere, everywhere), out_specs=everywhere
    )
    image, text = (side.astype(self.dtype) for side in embeddings)
    return island(image, text, group, logit_scale, logit_bias)

  def counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
    """What the local terms of a batch, or of parts of it, are divided by."""
    return {name: term.count(batch) for name, (_, term) in self.local_terms.items()}

  def local_loss(
    self, embeddings: Embeddings, batch: Batch, counts: Mapping[str, Float[Array, ""]]
  ) -> tuple[Float[Array, ""], Metrics]:
    """The local terms of a batch, or one part's share of them, and their metrics."""
    total, metrics = jnp.float32(0), {}
    for name, (weight, term) in self.local_terms.items():
      value = term.total(embeddings, batch) / counts[name]
      total = total + weight * value
      metrics[f"loss_{name}"] = value
    return total, metrics

  @property
  def _several(self) -> bool:
    return len(self.global_terms) + len(self.local_terms) > 1


def make_objective(
  weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]], dtype: str = "float32"
) -> Objective:
  """The weighted sum of named terms.

  Args:
    weights: name of a loss in `losses.OBJECTIVES` or of a local term -> its weight.
    options: keyword arguments of each loss, by its name.
    dtype: see `Objective`.

  Raises:
    UserError: for an unknown term, a weight that is not above 0, an option that its loss does not take or refuses, or
      no contrastive loss at all.
  """
  for name, weight in weights.items():
    require_known("loss", name, [*losses.OBJECTIVES, *LOCAL_TERMS])
    if not weight > 0:
      raise UserError(f"objective.{name}={weight} must be above 0: leave the term out to switch it off")
  chosen = {name: weight for name, weight in weights.items() if name in losses.OBJECTIVES}
  if not chosen:
    raise UserError(
      f"the objective {', '.join(weights)} has no term that keeps embeddings apart: add one of"
      f" {', '.join(losses.OBJECTIVES)}"
    )
  return Objective(
    {name: (weight, _bind(name, options.get(name, {}))) for name, weight in chosen.items()},
    {name: (weight, LOCAL_TERMS[name]) for name, weight in weights.items() if name not in chosen},
    dtype,
  )


def _bind(name: str, options: Mapping[str, Any]) -> Callable:
  """The loss called `name` with its options."""
  objective = losses.OBJECTIVES[name]
  allowed = [option for option in inspect.signature(objective).parameters if option not in _SUPPLIED]
  for option in options:
    if option not in allowed:
      raise UserError(
        f"loss_options.{name}.{option} is not an option of '{name}'{nearest(option, allowed)}:"
        f" it takes {', '.join(allowed)}"
      )
  objective = functools.partial(objective, **options)
  # Tracing it on two pairs finds values that it refuses now, not when the whole step is compiled.
  pair = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  jax.eval_shape(lambda image, text: objective(image, text, logit_scale=1.0, logit_bias=0.0), pair, pair)
  return objective
