"""The train state: a pure pytree, born sharded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.objectives import Objective, Sizes, Variable, objective
from contrastive_jax.objectives.term import SAMPLES
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec, batch_shards, parameter_shardings, replicated
from contrastive_jax.training import optimizer as optimizers

# Name of what the terms of the objective learn, among the parameters.
OBJECTIVE = "objective"


def towers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the dual encoder's parameters: all but those of the terms of the objective, which only training uses."""
  return {name: part for name, part in params.items() if name != OBJECTIVE}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step reads and writes, and that a checkpoint holds of the model.

  Attributes:
    step: number of updates done.
    params: all parameters of the dual encoder, nested dicts of float32 masters, and under `OBJECTIVE` what the terms of
      the objective learn, where they learn anything.
    opt_state: the optimiser's state, for the trained parameters only.
    average: exponential moving average of the trained parameters, or None.
    objective: the state of the objective's terms, by their names, or None.
  """

  step: Int[Array, ""] | Any
  params: Any
  opt_state: Any
  average: Any = None
  objective: Any = None

  def evaluated(self) -> Any:
    """Returns the dual encoder's parameters that evaluation uses: the average where there is one."""
    return towers(self.params if self.average is None else optimizers.combine(self.params, self.average))


@dataclasses.dataclass(frozen=True)
class StateSpec:
  """Everything known about a run's state before any of it exists.

  Attributes:
    model: the dual encoder's configuration.
    optimizer: the gradient transformation.
    frozen: regular expressions of parameters that are not trained.
    average: whether a moving average is kept.
    mesh: the mesh that the state lies on.
    rules: the mesh's sharding rules.
    objective: the objective that is minimised; None for a state that nothing trains.
    sizes: the sizes that the terms of the objective depend on; None is those of the model alone.
  """

  model: DualEncoderConfig
  optimizer: optax.GradientTransformation
  frozen: tuple[str, ...]
  average: bool
  mesh: Mesh
  rules: MeshSpec
  objective: Objective | None = None
  sizes: Sizes | None = None

  def create(self, seed: int) -> TrainState:
    """Makes a new state, initialised in place on its devices."""
    return jax.jit(self._create, out_shardings=self.shardings())(jax.random.key(seed))

  def _create(self, key: jax.Array) -> TrainState:
    params = dual_encoder.init(self.model, key)
    learned, remembered = self._variables()
    if learned:
      params = {**params, OBJECTIVE: objective.create(learned, key)}
    trained, _ = optimizers.split_frozen(params, self.frozen)
    # The average is its own buffer: a donated state must not hold the same array twice.
    average = jax.tree.map(jnp.array, trained) if self.average else None
    state = objective.create(remembered, key) if remembered else None
    return TrainState(jnp.int32(0), params, self.optimizer.init(trained), average, state)

  def abstract(self) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._create, jax.random.key(0))
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, self.shardings()
    )

  def shardings(self) -> TrainState:
    """Returns the sharding of every leaf of the state.

    Raises:
      UserError: if what is kept for every sample does not divide over the mesh.
    """
    _, params = dual_encoder.abstract(self.model)
    axes = dual_encoder.logical_axes(self.model)
    learned, remembered = self._variables()
    if learned:
      shapes = jax.eval_shape(lambda key: objective.create(learned, key), jax.random.key(0))
      params, axes = {**params, OBJECTIVE: shapes}, {**axes, OBJECTIVE: objective.axes(learned)}
    everywhere = replicated(self.mesh)
    placed = parameter_shardings(self.mesh, self.rules, params, axes)
    trained, _ = optimizers.split_frozen(params, self.frozen)
    placed_trained, _ = optimizers.split_frozen(placed, self.frozen)
    opt_state = optimizers.opt_state_shardings(
      jax.eval_shape(self.optimizer.init, trained), trained, placed_trained, everywhere
    )
    average = placed_trained if self.average else None
    return TrainState(
      everywhere, placed, opt_state, average, self._place_remembered(remembered) if remembered else None
    )

  def state_axes(self) -> dict[str, Any]:
    """Returns the logical axes of the state of the objective's terms."""
    return objective.axes(self._variables()[1])

  def _variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters and the state of the objective's terms."""
    if self.objective is None:
      return {}, {}
    sizes = dataclasses.replace(self.sizes or Sizes(self.model.embed_dim), model=self.model)
    return self.objective.params(sizes), self.objective.state(sizes)

  def _place_remembered(self, remembered: Mapping[str, Any]) -> dict[str, Any]:
    shards = batch_shards(self.mesh)

    def place(variable: Variable) -> NamedSharding:
      for length, axis in zip(variable.shape, variable.axes, strict=True):
        if axis == SAMPLES and length % shards:
          raise UserError(
            f"the {length} rows that the objective keeps for the samples do not divide over {shards} devices: use a"
            " number of devices that is a power of two"
          )
      return NamedSharding(
        self.mesh, PartitionSpec(*(BATCH_AXES if axis == SAMPLES else None for axis in variable.axes))
      )

    return jax.tree.map(place, dict(remembered), is_leaf=lambda node: isinstance(node, Variable))
