"""The objective of a run: one term or a weighted sum of several."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from contrastive_jax.batch import Batch
from contrastive_jax.errors import UserError, fields_of, nearest, require_known
from contrastive_jax.losses.pairwise import STRATEGIES
from contrastive_jax.models.dual_encoder import DualEncoder
from contrastive_jax.models.outputs import HARD_CAPTIONS, STRONG_IMAGE, STRONG_TEXT
from contrastive_jax.models.presets import with_tuples
from contrastive_jax.objectives.table import TERMS
from contrastive_jax.objectives.term import (
  SAMPLES,
  TEACHER_TEXT,
  Arrays,
  Average,
  Embeddings,
  GlobalTerm,
  LocalTerm,
  Metrics,
  Outputs,
  Pairs,
  Sizes,
  Term,
  Variable,
  WrapsTerm,
)
from contrastive_jax.parallel.mesh import BATCH_AXES, ring_order


@dataclasses.dataclass(frozen=True)
class Objective:
  """A weighted sum of terms.

  Attributes:
    terms: (weight, term) by the name of the term.
    dtype: type of the embeddings that global terms exchange and multiply; their logits and sums are float32.
  """

  terms: Mapping[str, tuple[float, Term]]
  dtype: str = "float32"

  @property
  def distils(self) -> bool:
    """Whether any term compares with a teacher's targets."""
    return any(term.distils for _, term in self.terms.values())

  def needs(self, what: str) -> bool:
    """Says whether any term needs this of a batch, as `Term.needs` lists it."""
    return any(what in term.needs for _, term in self.terms.values())

  @property
  def uses_average(self) -> bool:
    """Whether any term compares with what the moving average of the towers makes of the pairs."""
    return any(term.uses_average for _, term in self.terms.values())

  @property
  def embeds_average(self) -> bool:
    """Whether a global term compares with the embeddings that the moving average makes of the whole batch."""
    return any(term.uses_average for _, term in self.terms.values() if isinstance(term, GlobalTerm))

  @property
  def captions_needed(self) -> int:
    """The number of wrong captions of each pair that a batch must bring: terms with fewer read the first."""
    return max((term.captions_needed for _, term in self.terms.values()), default=0)

  @property
  def strong_images(self) -> int:
    """The number of strong views of each image that a batch must bring: terms with fewer read the first."""
    return max((term.strong_images for _, term in self.terms.values()), default=0)

  @property
  def strong_texts(self) -> int:
    """The number of changed captions of each pair that a batch must bring: terms with fewer read the first."""
    return max((term.strong_texts for _, term in self.terms.values()), default=0)

  def unlearned(self, pairs: int) -> dict[str, float]:
    """Returns the values of terms where embeddings tell nothing of so many pairs, by the names of their metrics."""
    found = {}
    for name, (weight, term) in self.terms.items():
      value = term.unlearned(pairs)
      if value is not None:
        found |= {f"loss_{name}": value} if len(self.terms) > 1 else {"loss": weight * value}
    return found

  def params(self, sizes: Sizes) -> dict[str, Any]:
    """Describes the parameters of the terms, by their names, without terms that have none.

    Raises:
      UserError: if the sizes do not suit a term.
    """
    return self._variables(lambda term: term.params(sizes))

  def state(self, sizes: Sizes) -> dict[str, Any]:
    """Describes the state of the terms, by their names, without terms that have none.

    Raises:
      UserError: if the sizes do not suit a term.
    """
    return self._variables(lambda term: term.state(sizes))

  def sample_values(self, state: Arrays) -> dict[str, Float[Array, "rows"]]:
    """Returns what of the state of its terms is looked at over samples, by what it is, as `Term.sample_values` does."""
    found = [term.sample_values(state[name]) for name, (_, term) in self.terms.items() if name in state]
    return {what: values for values_of in found for what, values in values_of.items()}

  def _variables(self, of: Callable[[Term], Arrays]) -> dict[str, Any]:
    found = {name: of(term) for name, (_, term) in self.terms.items()}
    return {name: variables for name, variables in found.items() if variables}

  def global_loss(
    self,
    embeddings: Embeddings,
    batch: Batch,
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None,
    mesh: Mesh,
    *,
    params: Arrays | None = None,
    state: Arrays | None = None,
    state_axes: Arrays | None = None,
    average: Embeddings | None = None,
    factors: Mapping[str, Float[Array, ""]] | None = None,
  ) -> tuple[Float[Array, ""], tuple[Metrics, Arrays]]:
    """Computes the global terms of embeddings that lie on the batch axes of `mesh`.

    Args:
      embeddings: the embeddings that each tower makes, by its name, as `models.outputs.for_global_terms` returns them.
      batch: the pairs; without targets the terms that distil are left out.
      logit_scale: multiplier of the similarities.
      logit_bias: the number added to the logits, or None.
      mesh: the mesh that the pairs lie on.
      params: the parameters of the terms.
      state: the state of the terms.
      state_axes: the logical axes of `state`, as `axes` returns them.
      average: the embeddings that the moving average of the towers makes of the same pairs, where a term uses them.
      factors: factors of the weights of terms, by their names; 1 where there is none.

    Returns:
      The value, and (metrics, state after the step).

    Raises:
      UserError: if a term needs the teacher's texts and the targets hold none.
    """
    params, remembered, targets = params or {}, state or {}, batch.targets
    if targets is not None and targets.text is None and self.needs(TEACHER_TEXT):
      raise UserError(self.no_teacher_text())
    order = ring_order(mesh)
    chosen = {
      name: (weight, term)
      for name, (weight, term) in self.terms.items()
      if isinstance(term, GlobalTerm) and (targets is not None or not term.distils)
    }
    used, state = ({name: own for name, own in arrays.items() if name in chosen} for arrays in (params, remembered))

    def local(pairs, present_in, params, state, factors):
      total, metrics, after = 0.0, {}, {}
      for name, (weight, term) in chosen.items():
        value, own, parts = term(
          dataclasses.replace(pairs, present=present_in.get(name)),
          params.get(name, {}),
          state.get(name, {}),
          axis_name=BATCH_AXES,
          ring_order=order,
        )
        total += weight * factors.get(name, 1.0) * value
        # Terms of a sum may have metrics of one name.
        metrics |= {f"{name}/{part}": number for part, number in parts.items()} if len(self.terms) > 1 else parts
        metrics |= {f"loss_{name}": value} if len(self.terms) > 1 else {}
        if name in state:
          after[name] = own
      return total, metrics, after

    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    narrow = jax.tree.map(lambda embedding: embedding.astype(self.dtype), dict(embeddings))
    image, text, hard = narrow.pop("image"), narrow.pop("text"), narrow.pop(HARD_CAPTIONS, None)
    beside = {"state_rows": batch.state_rows, "weights": batch.weights, "replayed": batch.replayed}
    if hard is not None:
      there = batch.hard_captions.there
      beside |= {"hard_text": hard.reshape(*there.shape, -1), "hard_there": there}
    if (views := narrow.pop(STRONG_IMAGE, None)) is not None:
      beside["strong_image"] = views.reshape(batch.pairs, batch.strong.patches.shape[1], -1)
    if (views := narrow.pop(STRONG_TEXT, None)) is not None:
      beside |= {"strong_text": views.reshape(*batch.strong.keys.shape[:2], -1), "strong_keys": batch.strong.keys}
    pairs = Pairs(image, text, batch.keys, logit_scale, logit_bias, others=narrow, **beside)
    if average is not None:
      slow = {f"average_{side}": jax.lax.stop_gradient(average[side].astype(self.dtype)) for side in ("image", "text")}
      pairs = dataclasses.replace(pairs, **slow)
    if targets is not None:
      teacher = jax.tree.map(lambda embedding: embedding.astype(self.dtype), targets)
      pairs = dataclasses.replace(pairs, teacher_image=teacher.image, teacher_text=teacher.text)
    where = dataclasses.replace(jax.tree.map(lambda _: split, pairs), logit_scale=everywhere)
    where = dataclasses.replace(where, logit_bias=None if logit_bias is None else everywhere)
    states = jax.tree.map(
      lambda names: PartitionSpec(*(BATCH_AXES if name == SAMPLES else None for name in names)),
      {name: state_axes[name] for name in state},
      is_leaf=lambda node: isinstance(node, tuple),
    )
    island = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(where, split, everywhere, states, everywhere),
      out_specs=(everywhere, everywhere, states),
    )
    factors = {name: jnp.asarray(factor, jnp.float32) for name, factor in (factors or {}).items()}
    value, metrics, after = island(pairs, dict(batch.present_in), used, state, factors)
    return value, (metrics, {**remembered, **after})

  def counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Computes the divisors of the local terms of a batch, or of parts of it."""
    return {
      name: term.count(_seen_by(name, batch)) for name, (_, term) in self.terms.items() if isinstance(term, LocalTerm)
    }

  def local_loss(
    self,
    model: DualEncoder,
    outputs: Outputs,
    batch: Batch,
    counts: Mapping[str, Float[Array, ""]],
    *,
    params: Arrays | None = None,
    average: Average | None = None,
    factors: Mapping[str, Float[Array, ""]] | None = None,
  ) -> tuple[Float[Array, ""], Metrics]:
    """Computes the local terms of a batch, or one part's share of them, and their metrics.

    Args:
      model: the dual encoder.
      outputs: what its towers make of the pairs, by the name of the tower.
      batch: the pairs; without targets the terms that distil are left out.
      counts: the divisors of the terms of the whole batch.
      params: the parameters of the terms.
      average: the moving average of the dual encoder and of the parameters of the terms, where a term uses it.
      factors: factors of the weights of terms, by their names; 1 where there is none.
    """
    total, metrics = jnp.float32(0), {}
    for name, (weight, term) in self.terms.items():
      if not isinstance(term, LocalTerm) or (term.distils and batch.targets is None):
        continue
      slow = {"average": (average[0], average[1].get(name, {}))} if term.uses_average else {}
      value = term.total(model, outputs, _seen_by(name, batch), (params or {}).get(name, {}), **slow)
      # Where no pair of the batch takes part there is nothing to divide.
      value = value / jnp.where(counts[name] > 0, counts[name], 1)
      total = total + weight * (factors or {}).get(name, 1.0) * value
      metrics[f"loss_{name}"] = value
    return total, metrics

  def no_teacher_text(self) -> str:
    """Returns the error for targets that lack the teacher's texts."""
    name = next(name for name, (_, term) in self.terms.items() if TEACHER_TEXT in term.needs)
    return (
      f"objective.{name} needs what the teacher makes of the captions, which a cache of targets does not hold: let the"
      " teacher run beside the model"
    )


def _seen_by(name: str, batch: Batch) -> Batch:
  """Returns the batch as a term sees it, of which some sources may be kept from it."""
  return dataclasses.replace(batch, present=batch.present_in.get(name))


def create(variables: Arrays, key: jax.Array) -> dict[str, Any]:
  """Makes the first values of variables, each term's from a key of its own."""

  def begin(term: str, tree: Any) -> Any:
    own = jax.random.fold_in(key, zlib.crc32(term.encode()))
    return jax.tree.map(lambda variable: variable.create(own, variable.shape), tree, is_leaf=_is_variable)

  return {term: begin(term, tree) for term, tree in variables.items()}


def axes(variables: Arrays) -> dict[str, Any]:
  """Returns the logical axes of variables, in trees of the same shape."""
  return jax.tree.map(lambda variable: variable.axes, dict(variables), is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
  return isinstance(node, Variable)


def make_objective(
  weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]], dtype: str = "float32"
) -> Objective:
  """Makes the weighted sum of named terms.

  Args:
    weights: the weight of each term, by its name in `TERMS`.
    options: the options of each term, by its name. Those of terms without a weight are checked and not used.
    dtype: type of the embeddings that global terms exchange and multiply.

  Raises:
    UserError: for an unknown term, a weight that is not above 0, an option that its term does not take or refuses, or
      no term that keeps embeddings apart.
  """
  # Names in the `objective` of a config are known already, since they are fields.
  for field, names in (("loss", weights), ("the name of a term in loss_options", options)):
    for name in names:
      require_known(field, name, TERMS)
  for name, weight in weights.items():
    if not weight > 0:
      raise UserError(f"objective.{name}={weight} must be above 0: leave the term out to switch it off")
  if not any(TERMS[name].separates for name in weights):
    apart = ", ".join(name for name, term in TERMS.items() if term.separates)
    raise UserError(f"the objective {', '.join(weights)} has no term that keeps embeddings apart: add one of {apart}")
  terms = {name: _make_term(name, options, name in weights) for name in dict.fromkeys((*weights, *options))}
  return Objective({name: (weight, terms[name]) for name, weight in weights.items()}, dtype)


def _make_term(name: str, options: Mapping[str, Mapping[str, Any]], used: bool) -> Term:
  """Makes a term, and tries it where it is used: a config has the options of all, and its ranges are checked apart."""
  allowed, own = term_options().get(name, {}), options.get(name, {})
  for option in own:
    if option not in allowed:
      known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
      raise UserError(f"loss_options.{name}.{option} is not an option of '{name}'{nearest(option, allowed)}: {known}")
  with fields_of(f"loss_options.{name}"):
    term = TERMS[name](**with_tuples(own))
    if any(field.name == "strategy" for field in dataclasses.fields(term)):
      require_known("strategy", term.strategy, STRATEGIES)
    if isinstance(term, WrapsTerm):
      require_known("of", term.of, [inner for inner, kind in TERMS.items() if _may_be_wrapped(kind)])
  if isinstance(term, WrapsTerm):
    term = term.around(_make_term(term.of, options, used))
  with fields_of(f"loss_options.{name}"):
    if used and isinstance(term, GlobalTerm):
      _try(term)
  return term


def _may_be_wrapped(kind: type[Term]) -> bool:
  return issubclass(kind, GlobalTerm) and kind.separates


@functools.cache
def _try(term: GlobalTerm) -> None:
  """Traces a term on two pairs, so that values it refuses are found now, not when the whole step is compiled."""
  sizes = Sizes(2, 2, samples=1)
  side, rows = jax.ShapeDtypeStruct((2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
  keys = jax.ShapeDtypeStruct((2, 2, 2), jnp.uint32)
  others = {name: side for name in term.towers if name not in ("image", "text")}
  hard = [jax.ShapeDtypeStruct((2, 1, *shape), dtype) for shape, dtype in (((2,), jnp.float32), ((), jnp.bool_))]
  weights = jax.ShapeDtypeStruct((2,), jnp.float32)
  strong = jax.ShapeDtypeStruct((2, 2, 2), jnp.float32), jax.ShapeDtypeStruct((2, 2, 2), jnp.float32), keys
  pairs = Pairs(side, side, keys, 1.0, 0.0, side, side, rows, others, side, side, weights, weights, *hard, *strong)
  # The key is made within the trace: one made outside would start JAX, and fix its devices and processes.
  arrays = [
    jax.eval_shape(lambda kind=kind: create({"": kind}, jax.random.key(0))[""])
    for kind in (term.params(sizes), term.state(sizes))
  ]
  jax.eval_shape(lambda *arguments: term(*arguments, axis_name=None)[0], pairs, *arrays)


def term_options() -> dict[str, dict[str, dataclasses.Field]]:
  """Returns the fields of `loss_options` for every term that has options, by its name."""
  terms = {name: {field.name: field for field in dataclasses.fields(term)} for name, term in TERMS.items()}
  return {name: options for name, options in terms.items() if options}
