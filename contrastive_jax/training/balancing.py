"""The logit bias of a new run from its first batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.objectives import Objective
from contrastive_jax.objectives.sigmoid import Sigmoid
from contrastive_jax.parallel.mesh import BATCH_AXES, put_batch, replicated, ring_order
from contrastive_jax.training import accumulation
from contrastive_jax.training.state import StateSpec, TrainState, towers


def balancing_term(objective: Objective) -> tuple[str, Sigmoid] | None:
  """Returns the name and the term of an objective that asks for a bias from the first batch, or None."""
  terms = ((name, term) for name, (_, term) in objective.terms.items())
  return next(((name, term) for name, term in terms if isinstance(term, Sigmoid) and term.balance_bias), None)


def check_bias(model: DualEncoderConfig, objective: Objective) -> None:
  """Raises a `UserError` where a bias is to be found from the first batch and the model has none."""
  if balancing_term(objective) is not None and model.init_logit_bias is None:
    raise UserError(
      "loss_options.sigmoid.balance_bias=True needs a logit bias, and model.init_logit_bias=None has none: set it to 0"
    )


def with_balanced_bias(spec: StateSpec, state: TrainState, batch: Batch, *, accumulate: int = 1) -> TrainState:
  """Returns the state with the logit bias that `losses.balanced_bias` finds for the pairs of a batch in the term.

  Where none of them takes part in it, the bias stays where it is.

  Args:
    spec: the model, and an objective in which a term asks for it.
    state: a new state.
    batch: this host's share of the first batch.
    accumulate: number of micro-batches that the towers embed one after the other.
  """
  graphdef, _ = dual_encoder.abstract(spec.model)
  name, term = balancing_term(spec.objective)
  how = {"strategy": term.strategy, "tile": term.tile, "ring_order": ring_order(spec.mesh), "axis_name": BATCH_AXES}

  def local(image, text, keys, present, scale):
    return losses.balanced_bias(image, text, logit_scale=scale, group=keys, present=present, **how)

  def find(params, batch: Batch):
    embeddings = accumulation.embed(graphdef, towers(params), batch, accumulate, spec.mesh)
    image, text = (embeddings[name].astype(spec.objective.dtype) for name in ("image", "text"))
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(local, mesh=spec.mesh, in_specs=(*[split] * 4, everywhere), out_specs=everywhere)
    present = batch.present_in.get(name)
    bias = island(image, text, batch.keys, present, jnp.exp(params["log_logit_scale"]))
    return bias if present is None else jnp.where(jnp.any(present), bias, params["logit_bias"])

  placed = put_batch(spec.mesh, batch.on_device())
  run = jax.jit(find, out_shardings=replicated(spec.mesh))
  bias = run(state.params, placed)
  average = state.average
  if average is not None and "logit_bias" in average:
    # A buffer of its own: a donated state must not hold the same one twice.
    average = {**average, "logit_bias": run(state.params, placed)}
  return dataclasses.replace(state, params={**state.params, "logit_bias": bias}, average=average)
