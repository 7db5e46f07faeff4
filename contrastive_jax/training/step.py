"""One update: towers, loss across the mesh, gradients, optimiser; compiled once with the state donated."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_jax.batch import Batch
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.outputs import HARD_CAPTIONS, STRONG_IMAGE, STRONG_TEXT, for_global_terms
from contrastive_jax.objectives.term import Metrics
from contrastive_jax.parallel.mesh import replicated
from contrastive_jax.training import accumulation
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.state import OBJECTIVE, StateSpec, TrainState, towers

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
  """A batch with the key of the noise of each row that a tower reads, by the name of the tower."""

  batch: Batch
  keys: dict[str, jax.Array]

  @classmethod
  def of(cls, batch: Batch, key: jax.Array) -> "_Rows":
    image, text = jax.random.split(key)
    keys = {"image": (image, batch.image.patches), "text": (text, batch.text.tokens)}
    if batch.hard_captions is not None:
      keys[HARD_CAPTIONS] = jax.random.fold_in(text, 1), batch.hard_captions.tokens
    if batch.strong is not None and batch.strong.patches is not None:
      keys[STRONG_IMAGE] = jax.random.fold_in(image, 1), batch.strong.patches
    if batch.strong is not None and batch.strong.tokens is not None:
      keys[STRONG_TEXT] = jax.random.fold_in(text, 2), batch.strong.tokens
    for name, inputs in batch.others.items():
      keys[name] = jax.random.fold_in(key, zlib.crc32(name.encode())), jax.tree.leaves(inputs)[0]
    every = jax.vmap(jax.random.fold_in, (None, 0))
    return cls(batch, {name: every(key, jnp.arange(rows.shape[0])) for name, (key, rows) in keys.items()})


def _are_finite(tree: Any) -> jax.Array:
  """Says whether all leaves are finite, in half the time that `jnp.isfinite` of each entry takes on a CPU."""
  with jax.named_scope("finite"):
    return jnp.isfinite(sum(jnp.sum(leaf * 0) for leaf in jax.tree.leaves(tree)))


def _with_bounded_scales(params: Any, most: float) -> Any:
  """Returns parameters whose logit scales, that of the model and those of terms, lie in [1, most]."""

  def bounded(path, leaf):
    return jnp.clip(leaf, 0.0, math.log(most)) if path[-1].key == "log_logit_scale" else leaf

  return jax.tree_util.tree_map_with_path(bounded, params)


def make_value_and_grad(spec: StateSpec, *, accumulate: int = 1) -> Callable:
  """Makes the function that computes the objective and its gradients.

  Args:
    spec: the model, the objective and their placement.
    accumulate: number of micro-batches that the batch is cut into; the gradients do not depend on it.

  Returns:
    A function of (trained parameters, frozen parameters, batch, key of the step's noise) and, where they are not None,
    the factors of the terms' weights, what the terms remember and the moving average of the trained parameters,
    to `((loss, (metrics, what the terms remember)), gradients by the trained parameters)`.
  """
  objective, state_axes = spec.objective, spec.state_axes()
  graphdef, _ = dual_encoder.abstract(spec.model)
  gradient_shardings, _ = optimizers.split_frozen(spec.shardings().params, spec.frozen)

  def value_and_grad(trained, frozen, batch: Batch, key, factors=None, remembered=None, average=None):
    counts = objective.counts(batch)
    slow = None
    if objective.embeds_average:
      with jax.named_scope("average"):
        params = towers(optimizers.combine(average, frozen))
        slow = accumulation.embed(graphdef, params, batch, accumulate, spec.mesh)

    def run(trained, rows: _Rows):
      model = dual_encoder.merge(graphdef, towers(optimizers.combine(trained, frozen)))
      with jax.named_scope("towers"), jax.sharding.use_abstract_mesh(spec.mesh.abstract_mesh):
        outputs = model(rows.batch, keys=rows.keys)
      return for_global_terms(outputs), (model, outputs)

    def global_loss(trained, embeddings):
      params = optimizers.combine(trained, frozen)
      scale, bias = jnp.exp(params["log_logit_scale"]), params.get("logit_bias")
      with jax.named_scope("loss"):
        loss, (metrics, after) = objective.global_loss(
          embeddings,
          batch,
          scale,
          bias,
          spec.mesh,
          params=params.get(OBJECTIVE),
          state=remembered,
          state_axes=state_axes,
          average=slow,
          factors=factors,
        )
      metrics = {**metrics, "logit_scale": scale} | ({} if bias is None else {"logit_bias": bias})
      return loss, (metrics, after or None)

    def local_loss(trained, made, rows: _Rows):
      model, outputs = made
      params, slow = optimizers.combine(trained, frozen).get(OBJECTIVE), None
      if objective.uses_average:
        whole = optimizers.combine(average, frozen)
        slow = dual_encoder.merge(graphdef, towers(whole)), whole.get(OBJECTIVE, {})
      with jax.named_scope("loss"), jax.sharding.use_abstract_mesh(spec.mesh.abstract_mesh):
        return objective.local_loss(model, outputs, rows.batch, counts, params=params, average=slow, factors=factors)

    rows = _Rows.of(batch, key)
    if accumulate > 1:
      parts = accumulation.split_batch(rows, accumulate, spec.mesh)
      (value, ((metrics, after), more)), gradients = accumulation.value_and_grad(
        run, global_loss, local_loss, trained, parts, mesh=spec.mesh, shardings=gradient_shardings
      )
      return (value, (metrics | more, after)), gradients

    def loss_fn(trained):
      embeddings, made = run(trained, rows)
      loss, (metrics, after) = global_loss(trained, embeddings)
      local, more = local_loss(trained, made, rows)
      return loss + local, (metrics | more, after)

    return jax.value_and_grad(loss_fn, has_aux=True)(trained)

  return value_and_grad


def make_train_step(
  spec: StateSpec,
  schedule: optimizers.Schedule,
  *,
  seed: int,
  accumulate: int = 1,
  average_decay: float = 0.0,
  max_logit_scale: float = 100.0,
  skip_nonfinite: bool = False,
  factors: Callable[[jax.Array], Mapping[str, jax.Array]] | None = None,
) -> TrainStep:
  """Makes the train step, which compiles at its first call and consumes the state that it is given.

  Args:
    spec: the model, the objective, the optimiser and their placement.
    schedule: the learning rate of each step, that of `spec.optimizer`, which the metrics report.
    seed: the seed of noise: dropout and drop path of row i in step k draw from `(seed, k, i)`.
    accumulate: number of micro-batches that the batch is cut into; the gradients do not depend on it.
    average_decay: decay of the moving average; its first steps use `(1 + step) / (10 + step)` where that is smaller.
    max_logit_scale: the largest logit scale; the model's, and those of terms, are kept in [1, this] after every update.
    skip_nonfinite: whether everything but the step stays as it was when the loss, the gradient or an updated parameter
      is not finite. The state before the update is then kept until that is known, which takes memory.
    factors: a function from the step to factors that multiply the weights of terms, by their names; None is 1 for all,
      as for terms without a name in it. Where that of the terms that distil is 0, batches may come without targets: the
      teacher need not run.

  Returns:
    A function of (state, batch) to (state, metrics); metrics are scalars on every device, of which "finite" is 1 where
    the loss, the gradient and all updated parameters are finite, and 0 elsewhere.
  """
  value_and_grad = make_value_and_grad(spec, accumulate=accumulate)

  def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    trained, frozen = optimizers.split_frozen(state.params, spec.frozen)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    now = {} if factors is None else factors(state.step)
    (loss, (metrics, remembered)), gradients = value_and_grad(
      trained, frozen, batch, key, now, state.objective, state.average
    )
    with jax.named_scope("optimizer"):
      norm = optax.tree.norm(gradients)
      updates, opt_state = spec.optimizer.update(gradients, optimizers.at_step(state.opt_state, state.step), trained)
      updated = optax.apply_updates(trained, updates)
    updated = _with_bounded_scales(updated, max_logit_scale)
    average = state.average
    if average is not None:
      decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
      average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, updated)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step), **metrics}
    for name, factor in now.items():
      if batch.targets is not None or not spec.objective.terms[name][1].distils:
        metrics[f"factor_{name}"] = jnp.asarray(factor, jnp.float32)
    new = TrainState(state.step + 1, optimizers.combine(updated, frozen), opt_state, average, remembered)
    # The squares within a finite norm are finite, and so are the moments and the average that are made of them.
    # As a branch it reads them once they are written; XLA would otherwise compute the update a second time for it.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    finite = jax.lax.cond(finite, _are_finite, lambda _: jnp.bool_(False), (updated, remembered))
    metrics["finite"] = finite.astype(jnp.float32)
    if skip_nonfinite:
      kept = jax.tree.map(lambda old, fresh: jnp.where(finite, fresh, old), state, new)
      new = TrainState(new.step, kept.params, kept.opt_state, kept.average, kept.objective)
      metrics["skipped"] = 1.0 - finite
    return new, metrics

  return jax.jit(update, donate_argnums=0, out_shardings=(spec.shardings(), replicated(spec.mesh)))
