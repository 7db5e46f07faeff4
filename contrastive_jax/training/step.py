"""One update: towers, loss across the mesh, gradients, optimiser; compiled once with the state donated."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from contrastive_jax import losses
from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, nearest, require_known
from contrastive_jax.models import dual_encoder
from contrastive_jax.parallel.mesh import BATCH_AXES, replicated
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.state import StateSpec, TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
_SUPPLIED = ("image", "text", "logit_scale", "logit_bias", "group", "axis_name")


def find_objective(name: str, options: Mapping[str, Any]) -> Callable:
  """The loss called `name`, with `options` bound to it.

  Raises:
    UserError: for an unknown loss or an option that it does not take.
  """
  require_known("loss", name, losses.OBJECTIVES)
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


def across_mesh(objective: Callable, mesh: Mesh) -> Callable:
  """Makes a loss on local shards into a loss on global arrays, whose embeddings lie on the batch axes of `mesh`."""

  def sharded(image, text, group, logit_scale, logit_bias):
    def local(image, text, group, logit_scale, logit_bias):
      return objective(image, text, logit_scale=logit_scale, logit_bias=logit_bias, group=group, axis_name=BATCH_AXES)

    pairs, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    island = jax.shard_map(
      local, mesh=mesh, in_specs=(pairs, pairs, pairs, everywhere, everywhere), out_specs=everywhere
    )
    return island(image, text, group, logit_scale, logit_bias)

  return sharded


def make_train_step(
  spec: StateSpec,
  objective: Callable,
  schedule: optimizers.Schedule,
  *,
  seed: int,
  average_decay: float = 0.0,
  max_logit_scale: float = 100.0,
  skip_nonfinite: bool = False,
) -> TrainStep:
  """Compiles lazily; calling it consumes the state.

  Args:
    spec: model, optimiser and placement.
    objective: loss on local shards, see `losses`.
    schedule: learning rate of each step, reported in the metrics.
    seed: dropout and drop path of step k draw from `(seed, k)`.
    average_decay: of the moving average; its first steps use `(1 + step) / (10 + step)` where that is smaller.
    max_logit_scale: the logit scale is kept in [1, this] after every update.
    skip_nonfinite: leave everything but the step as it was when the loss or the gradient is not finite.

  Returns:
    A function of (state, batch) to (state, metrics); metrics are scalars on every device.
  """
  graphdef, _ = dual_encoder.abstract(spec.model)
  loss_on_mesh = across_mesh(objective, spec.mesh)

  def loss_fn(trained, frozen, batch: Batch, key):
    model = dual_encoder.merge(graphdef, optimizers.combine(trained, frozen))
    image_key, text_key = jax.random.split(key)
    with jax.named_scope("towers"):
      image = model.encode_image(batch.image, key=image_key)
      text = model.encode_text(batch.text.tokens, batch.text.mask, key=text_key)
    scale = jnp.exp(model.log_logit_scale[...])
    bias = None if model.logit_bias is None else model.logit_bias[...]
    with jax.named_scope("loss"):
      loss, metrics = loss_on_mesh(image, text, batch.text.group, scale, bias)
    metrics = {**metrics, "logit_scale": scale}
    if bias is not None:
      metrics["logit_bias"] = bias
    return loss, metrics

  def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    trained, frozen = optimizers.split_frozen(state.params, spec.frozen)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained, frozen, batch, key)
    with jax.named_scope("optimizer"):
      norm = optax.tree.norm(gradients)
      updates, slots = spec.optimizer.update(gradients, state.slots, trained)
      updated = optax.apply_updates(trained, updates)
    if "log_logit_scale" in updated:
      updated["log_logit_scale"] = jnp.clip(updated["log_logit_scale"], 0.0, math.log(max_logit_scale))
    average = state.average
    if average is not None:
      decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
      average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, updated)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step), **metrics}
    new = TrainState(state.step + 1, optimizers.combine(updated, frozen), slots, average)
    if skip_nonfinite:
      finite = jnp.isfinite(loss) & jnp.isfinite(norm)
      kept = jax.tree.map(lambda old, fresh: jnp.where(finite, fresh, old), state, new)
      new = TrainState(new.step, kept.params, kept.slots, kept.average)
      metrics["skipped"] = 1.0 - finite
    return new, metrics

  return jax.jit(update, donate_argnums=0, out_shardings=(spec.shardings(), replicated(spec.mesh)))
