"""Optimisers and learning-rate schedules by name, and the split of parameters into trained and frozen."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

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
  """Learning rate of each step.

  Args:
    name: what follows the linear warm-up: "cosine" or "linear" decay to `end_factor * peak` at `total_steps`; "rsqrt",
      `peak * sqrt(timescale / (timescale + steps after the warm-up))`; "constant"; "cooldown", constant that cools.
    peak: the highest rate.
    total_steps: steps of the whole run.
    warmup_steps: the rate rises linearly and first equals `peak` in the last of these steps.
    end_factor: final rate over `peak`, of "cosine" and "linear".
    timescale: steps after which "rsqrt" has fallen to 0.71 of its peak (Zhai et al., Scaling Vision Transformers).
    cooldown_steps: the last steps, over which "rsqrt", "constant" and "cooldown" fall linearly to zero.

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
  """Dimensions of one layer's parameter: a stack of layers has one more."""
  return leaf.ndim - is_stacked([entry.key for entry in path])


def decayed(params: Params) -> Any:
  """True for what weight decay applies to: parameters of two or more dimensions, as in open_clip."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: _layer_ndim(path, leaf) >= 2, params)


def _orthogonalised(params: Params) -> Any:
  """Muon's (rows, columns) of each matrix product's kernel; None for what Adam trains: tables, norms, biases."""

  def dimensions(path, leaf):
    if path[-1].key == "kernel" and _layer_ndim(path, leaf) == 2:
      return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
    return None

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _adamw(rate, options):
  return optax.adamw(rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, mask=decayed)


def _lion(rate, options):
  return optax.lion(rate, options.b1, options.b2, weight_decay=options.weight_decay, mask=decayed)


def _adafactor(rate, options):
  # As in Scaling Vision Transformers: first moment kept, no relative step, no scaling by the parameter's size.
  factored = optax.adafactor(
    None,
    multiply_by_parameter_scale=False,
    clipping_threshold=1.0,
    momentum=options.b1 or None,
    decay_rate=options.adafactor_decay,
  )
  decay = optax.add_decayed_weights(options.weight_decay, mask=decayed)
  # `optax.adafactor` ends by flipping the sign; it is flipped back so that one rate scales the step and the decay.
  return optax.chain(factored, optax.scale(-1.0), decay, optax.scale_by_learning_rate(rate))


def _muon(rate, options):
  ratio = options.muon_learning_rate / options.learning_rate
  return optax.contrib.muon(
    lambda step: ratio * rate(step),
    adam_learning_rate=rate,
    beta=options.muon_beta,
    weight_decay=options.weight_decay,
    weight_decay_mask=decayed,
    adam_b1=options.b1,
    adam_b2=options.b2,
    adam_weight_decay=options.weight_decay,
    muon_weight_dimension_numbers=_orthogonalised,
    consistent_rms=options.muon_rms,
  )


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


def make_optimizer(options: Any, schedule: Schedule) -> optax.GradientTransformation:
  """The optimiser of `config.optimizer`, gradient clipping first.

  Args:
    options: `name`, `weight_decay`, `clip_norm` (0 is off), `b1`, `b2`, `eps`, `adafactor_decay`, and Muon's
      `muon_learning_rate`, `muon_beta` and `muon_rms`.
    schedule: learning rate of each step.
  """
  require_known("optimizer.name", options.name, OPTIMIZERS)
  transforms = [OPTIMIZERS[options.name](schedule, options)]
  if options.clip_norm:
    transforms.insert(0, optax.clip_by_global_norm(options.clip_norm))
  return optax.chain(*transforms)


def split_frozen(params: Params, patterns: Sequence[str]) -> tuple[dict, dict]:
  """Divides nested parameters into (trained, frozen) by regular expressions on their "/"-joined paths.

  A pattern must match from the start of a path: "vision/" freezes the image tower.

  Raises:
    UserError: if a pattern matches nothing or nothing is left to train.
  """
  flat = traverse_util.flatten_dict(params)
  names = {path: "/".join(path) for path in flat}
  for pattern in patterns:
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


def slot_shardings(abstract: Any, params: Params, shardings: Params, replicated: Any) -> Any:
  """Shardings of the optimiser's slots: a slot shaped like its parameter lies where the parameter lies.

  A slot is its parameter's when its path ends with the parameter's: `optax.tree.map_params` does not see through the
  masks of optimisers that treat some parameters differently.

  Args:
    abstract: abstract state of the optimiser.
    params: abstract trained parameters.
    shardings: their shardings.
    replicated: the sharding of everything else (counters, factored moments).
  """
  shapes, places = traverse_util.flatten_dict(params), traverse_util.flatten_dict(shardings)

  def place(path, slot):
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    owner = next((keys[start:] for start in range(len(keys)) if keys[start:] in shapes), None)
    return places[owner] if owner is not None and shapes[owner].shape == slot.shape else replicated

  return jax.tree_util.tree_map_with_path(place, abstract)
