"""The train state: a pure pytree, born sharded."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import MeshSpec, parameter_shardings, replicated
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.objective import PROJECTION_AXES

PROJECTIONS = "projections"


def towers(params: Mapping[str, Any]) -> dict[str, Any]:
  """The dual encoder's parameters: all but the projections into a teacher's space, which only training uses."""
  return {name: part for name, part in params.items() if name != PROJECTIONS}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step reads and writes, and all that a checkpoint holds of the model.

  Attributes:
    step: number of updates done.
    params: all parameters of the dual encoder, nested dicts of float32 masters, and the projections under a name of
      their own where there are any.
    slots: the optimiser's state, for the trained parameters only.
    average: exponential moving average of the trained parameters, or None.
  """

  step: Int[Array, ""] | Any
  params: Any
  slots: Any
  average: Any = None

  def evaluated(self) -> Any:
    """The dual encoder's parameters that evaluation uses: the average where there is one."""
    return towers(self.params if self.average is None else optimizers.combine(self.params, self.average))


@dataclasses.dataclass(frozen=True)
class StateSpec:
  """Everything known about a run's state before any of it exists.

  Attributes:
    model: the dual encoder's configuration.
    optimizer: the gradient transformation.
    frozen: regular expressions of parameters that are not trained.
    average: whether a moving average is kept.
    mesh: where the state lives.
    rules: the mesh's sharding rules.
    projections: (name, (features in, features out)) of learned linear maps into a teacher's space, see
      `Objective.projections`.
  """

  model: DualEncoderConfig
  optimizer: optax.GradientTransformation
  frozen: tuple[str, ...]
  average: bool
  mesh: Mesh
  rules: MeshSpec
  projections: tuple[tuple[str, tuple[int, int]], ...] = ()

  def create(self, seed: int) -> TrainState:
    """A new state, initialised in place on its devices."""
    return jax.jit(self._create, out_shardings=self.shardings())(jax.random.key(seed))

  def _create(self, key: jax.Array) -> TrainState:
    params = dual_encoder.init(self.model, key)
    for name, shape in self.projections:
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      kernel = jax.random.normal(own, shape) / jnp.sqrt(shape[0])
      params.setdefault(PROJECTIONS, {})[name] = {"kernel": kernel}
    trained, _ = optimizers.split_frozen(params, self.frozen)
    # The average is its own buffer: a donated state must not hold the same array twice.
    average = jax.tree.map(jnp.array, trained) if self.average else None
    return TrainState(jnp.int32(0), params, self.optimizer.init(trained), average)

  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(self._create, jax.random.key(0))
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, self.shardings()
    )

  def shardings(self) -> TrainState:
    """Where every leaf of the state lies."""
    _, params = dual_encoder.abstract(self.model)
    axes = dual_encoder.logical_axes(self.model)
    if self.projections:
      shapes = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in self.projections}
      params = {**params, PROJECTIONS: shapes}
      axes = {**axes, PROJECTIONS: {name: {"kernel": PROJECTION_AXES} for name in shapes}}
    everywhere = replicated(self.mesh)
    placed = parameter_shardings(self.mesh, self.rules, params, axes)
    trained, _ = optimizers.split_frozen(params, self.frozen)
    placed_trained, _ = optimizers.split_frozen(placed, self.frozen)
    slots = optimizers.slot_shardings(jax.eval_shape(self.optimizer.init, trained), trained, placed_trained, everywhere)
    return TrainState(everywhere, placed, slots, placed_trained if self.average else None)
