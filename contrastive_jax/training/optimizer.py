"""Optimisers and learning-rate schedules by name, and the split of parameters into trained and frozen."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models.dual_encoder import is_stacked

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
Params = Mapping[str, Any]

SCHEDULES = ("constant", "cooldown", "cosine", "linear", "rsqrt")


def make_schedule(
  name: str,
  *,
  peak: float,
  total_steps: int,
  warmup_steps: int = 0,
  end_factor: float = 0.0,
  timescale: int = 10_000,
  cooldown_steps: int = 0,
) -> Schedule:
  """Makes the learning rate of each step.

  Args:
    name: name of the phase after the linear warm-up: "cosine" or "linear" decay to `end_factor * peak` at
      `total_steps`; "rsqrt", `peak * sqrt(timescale / (timescale + steps after the warm-up))`; "constant"; "cooldown",
      a constant rate that cools down.
    peak: the highest rate.
    total_steps: number of steps of the whole run.
    warmup_steps: number of steps over which the rate rises linearly; in the last of them it first equals `peak`.
    end_factor: final rate over `peak`, of "cosine" and "linear".
    timescale: number of steps after which "rsqrt" has fallen to 0.71 of its peak (Zhai et al., Scaling Vision
      Transformers).
    cooldown_steps: number of the last steps, over which "rsqrt", "constant" and "cooldown" fall linearly to zero.

  Raises:
    UserError: for an unknown name or phases that do not fit into the run.
  """
  require_known("schedule.name", name, SCHEDULES)
  if warmup_steps < 0 or cooldown_steps < 0 or warmup_steps + cooldown_steps > total_steps:
    raise UserError(
      f"schedule.warmup_steps={warmup_steps} and schedule.cooldown_steps={cooldown_steps} do not fit into"
      f" total_steps={total_steps}: shorten them or lengthen the run"
    )
  if name in ("cosine", "linear") and cooldown_steps:
    raise UserError(
      f"schedule.cooldown_steps={cooldown_steps} has no place in '{name}', which decays to the end: set it to 0"
    )
  if name == "cooldown" and not cooldown_steps:
    raise UserError("schedule.name='cooldown' needs schedule.cooldown_steps of at least 1")

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    since = jnp.maximum(step - warmup_steps, 0)
    progress = jnp.clip(since / max(total_steps - warmup_steps, 1), 0, 1)
    if name == "cosine":
      factor = end_factor + (1 - end_factor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    elif name == "linear":
      factor = end_factor + (1 - end_factor) * (1 - progress)
    elif name == "rsqrt":
      factor = jnp.sqrt(timescale / (timescale + since))
    else:
      factor = jnp.float32(1)
    if warmup_steps:
      factor = jnp.where(step < warmup_steps, (step + 1) / warmup_steps, factor)
    if cooldown_steps:
      factor = factor * jnp.clip((total_steps - step) / (cooldown_steps + 1), 0, 1)
    return peak * factor

  return schedule


def _layer_ndim(path: Sequence[Any], leaf: Any) -> int:
  """Returns the number of dimensions of one layer's parameter: a stack of layers has one more."""
  return leaf.ndim - is_stacked([entry.key for entry in path])


def decayed(params: Params) -> Any:
  """Marks the parameters that weight decay applies to: those of two or more dimensions, as in open_clip."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _layer_ndim(path, leaf) >= 2, params)


def _groups(params: Params) -> Any:
  """Returns "muon" for the kernel of each matrix product, and "adam" for all else: tables, norms, biases, the scale."""

  def group(path, leaf):
    return "muon" if path[-1].key == "kernel" and _layer_ndim(path, leaf) == 2 else "adam"

  return jax.tree_util.tree_map_with_path(group, params)


def _adamw(rate, options):
  return optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, mask=decayed)


def _lion(rate, options):
  return optax.lion(rate, options.b1, options.b2, weight_decay=options.weight_decay, mask=decayed)


def _adafactor(rate, options):
  # As in Scaling Vision Transformers: first moment kept, no relative step, no scaling by the parameter's size.
  momentum = [optax.ema(options.b1, debias=False)] if options.b1 else []
  # The identities keep every part of the state at the place that it has in checkpoints.
  factored = optax.chain(_scale_by_factored_rms(options.adafactor_decay), _clip_rms(1.0), *momentum, optax.identity())
  decay = optax.add_decayed_weights(options.weight_decay, mask=decayed)
  return optax.chain(factored, optax.identity(), decay, optax.scale_by_learning_rate(rate))


def _scale_by_factored_rms(decay_rate: float, *, least: int = 128, epsilon: float = 1e-30):
  """Divides by Adafactor's estimate of the root mean square of each gradient (arXiv 1804.04235, algorithm 4).

  It is `optax.scale_by_factored_rms` for layers that are stacked in one array: which two axes are factored, and
  whether any are, follows from the shape of one layer.

  Args:
    decay_rate: exponent of the decay of the estimate, which is `1 - t^-decay_rate` at the t-th update.
    least: two axes are factored where both have at least this size; other parameters keep a full estimate.
    epsilon: added to the squared gradient.
  """

  def factored_axes(path, leaf):
    stacked = leaf.ndim - _layer_ndim(path, leaf)
    order = np.argsort(leaf.shape[stacked:])
    if len(order) < 2 or leaf.shape[stacked:][order[-2]] < least:
      return None
    return int(order[-2]) + stacked, int(order[-1]) + stacked

  def init(params):
    def estimates(path, leaf):
      axes, unused = factored_axes(path, leaf), jnp.zeros((1,), leaf.dtype)
      if axes is None:
        return unused, unused, jnp.zeros_like(leaf)
      second, largest = axes
      row, column = (jnp.zeros(np.delete(leaf.shape, axis), leaf.dtype) for axis in (largest, second))
      return row, column, unused

    return optax.FactoredState(jnp.zeros([], jnp.int32), *_unzip(estimates, 3, params))

  def update(gradients, state, params=None):
    del params
    kept = 1 - jnp.float32(state.count + 1) ** -decay_rate

    def scale(path, gradient, row, column, full):
      axes, square = factored_axes(path, gradient), jnp.square(gradient) + epsilon
      if axes is None:
        full = kept * full + (1 - kept) * square
        return gradient * full**-0.5, row, column, full
      second, largest = axes
      row = kept * row + (1 - kept) * jnp.mean(square, axis=largest)
      column = kept * column + (1 - kept) * jnp.mean(square, axis=second)
      mean = jnp.mean(row, axis=second - (second > largest), keepdims=True)
      by_row, by_column = (row / mean) ** -0.5, column**-0.5
      return gradient * jnp.expand_dims(by_row, largest) * jnp.expand_dims(by_column, second), row, column, full

    updates, *estimates = _unzip(scale, 4, gradients, state.v_row, state.v_col, state.v)
    return updates, optax.FactoredState(optax.safe_increment(state.count), *estimates)

  return optax.GradientTransformation(init, update)


def _unzip(function: Callable, count: int, *trees: Any) -> list[Any]:
  """Returns `count` trees, of the first, second, ... of what `function` of a path and its leaves returns."""
  results = jax.tree_util.tree_map_with_path(function, *trees)
  structure = jax.tree.structure(trees[0])
  return [jax.tree.unflatten(structure, [parts[i] for parts in structure.flatten_up_to(results)]) for i in range(count)]


def _clip_rms(threshold: float) -> optax.GradientTransformation:
  """Scales down the update of each layer's parameter whose root mean square is above `threshold`."""

  def clip(path, update):
    axes = tuple(range(update.ndim - _layer_ndim(path, update), update.ndim))
    rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
    return update / jnp.maximum(1.0, rms / threshold)

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def _muon(rate, options):
  ratio = options.muon_learning_rate / options.learning_rate
  matrices = optax.chain(
    optax.contrib.scale_by_muon(
      beta=options.muon_beta, eps=options.eps, weight_dimension_numbers=functools.partial(jax.tree.map, _last_two_axes)
    ),
    optax.stateless(lambda updates, _: jax.tree.map(functools.partial(_with_rms, options.muon_rms), updates)),
    optax.add_decayed_weights(options.weight_decay, mask=decayed),
    optax.scale_by_learning_rate(lambda step: ratio * rate(step)),
  )
  rest = optax.chain(
    optax.scale_by_adam(options.b1, options.b2, options.eps, nesterov=True),
    # `optax.adamw` with a mask would have another state than checkpoints have.
    optax.stateless(functools.partial(_add_decay, options.weight_decay)),
    optax.scale_by_learning_rate(rate),
  )
  return optax.partition({"muon": matrices, "adam": rest}, _groups)


def _add_decay(weight_decay: float, updates: Params, params: Params) -> Params:
  return jax.tree.map(
    lambda decays, update, param: update + weight_decay * param if decays else update, decayed(params), updates, params
  )


def _last_two_axes(matrices: Float[Array, "*layers rows columns"]) -> optax.contrib.MuonDimensionNumbers:
  return optax.contrib.MuonDimensionNumbers((matrices.ndim - 2,), (matrices.ndim - 1,))


def _with_rms(rms: float, orthogonal: Float[Array, "*layers rows columns"]) -> Float[Array, "*layers rows columns"]:
  """Scales matrices with singular values of 1 to a root mean square of `rms` (arXiv 2502.16982, equation 4)."""
  return jnp.sqrt(jnp.float32(max(orthogonal.shape[-2:]))) * rms * orthogonal


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


def make_optimizer(options: ConfigDict, schedule: Schedule) -> optax.GradientTransformation:
  """Makes the optimiser of `config.optimizer`, which clips gradients first.

  Args:
    options: `name`, `weight_decay`, `clip_norm` (0 is off), `b1`, `b2`, `eps`, `adafactor_decay`, and Muon's
      `muon_learning_rate`, `muon_beta` and `muon_rms`.
    schedule: the learning rate of each step.

  Returns:
    A transformation that counts its own calls; `at_step` gives its schedules the step of the run instead.
  """
  require_known("optimizer.name", options.name, OPTIMIZERS)
  transforms = [OPTIMIZERS[options.name](schedule, options)]
  if options.clip_norm:
    transforms.insert(0, optax.clip_by_global_norm(options.clip_norm))
  return optax.chain(*transforms)


def at_step(opt_state: Any, step: Int[Array, ""] | int) -> Any:
  """Returns the optimiser's state with its learning rate at `step` of the run.

  A run has one count of steps, and a step whose update is skipped is one of them: the rate goes on. What an optimiser
  counts for its moments (bias corrections, Adafactor's decay) stays the number of gradients that went into them.

  Args:
    opt_state: state of an optimiser that `make_optimizer` made.
    step: number of steps before this one, skipped ones included.
  """

  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)

  def moved(node):
    return node._replace(count=jnp.asarray(step, node.count.dtype)) if is_schedule(node) else node

  return jax.tree.map(moved, opt_state, is_leaf=is_schedule)


def split_frozen(params: Params, patterns: Sequence[str]) -> tuple[dict, dict]:
  """Divides nested parameters into (trained, frozen) by regular expressions on their "/"-joined paths.

  A pattern must match from the start of a path: "image/" freezes the image tower.

  Raises:
    UserError: if a pattern is no regular expression, matches nothing, or nothing is left to train.
  """
  flat = traverse_util.flatten_dict(params)
  names = {path: "/".join(path) for path in flat}
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f"frozen has '{pattern}', which is no regular expression: {error}") from None
    if not any(re.match(pattern, name) for name in names.values()):
      tops = ", ".join(sorted({path[0] for path in flat}))
      raise UserError(f"frozen has '{pattern}', which matches no parameter: paths start with one of {tops}")
  frozen = {path: leaf for path, leaf in flat.items() if any(re.match(pattern, names[path]) for pattern in patterns)}
  trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
  if not trained:
    raise UserError(f"frozen={list(patterns)} matches every parameter: leave something to train")
  return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def combine(trained: Params, frozen: Params) -> dict:
  """Undoes `split_frozen`."""
  return traverse_util.unflatten_dict({**traverse_util.flatten_dict(trained), **traverse_util.flatten_dict(frozen)})


def opt_state_shardings(abstract: Any, params: Params, shardings: Params, replicated: Any) -> Any:
  """Returns the shardings of the optimiser's state: an array shaped like its parameter lies where the parameter lies.

  An array is its parameter's when its path ends with the parameter's: `optax.tree.map_params` does not see through the
  masks of optimisers that treat some parameters differently.

  Args:
    abstract: abstract state of the optimiser.
    params: abstract trained parameters.
    shardings: their shardings.
    replicated: the sharding of everything else (counters, factored moments).
  """
  shapes, places = traverse_util.flatten_dict(params), traverse_util.flatten_dict(shardings)

  def place(path, leaf):
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    owner = next((keys[start:] for start in range(len(keys)) if keys[start:] in shapes), None)
    return places[owner] if owner is not None and shapes[owner].shape == leaf.shape else replicated

  return jax.tree_util.tree_map_with_path(place, abstract)
