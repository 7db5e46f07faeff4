"""Placement of activations and weights inside a step, where the partitioner would choose badly.

Outside `jax.sharding.use_abstract_mesh` nothing is placed, so that models run on one device as they are.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec


def platform() -> str:
  """Returns the platform that the program is traced for: that of the mesh's devices, which need not be here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def split_by_rows(x: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
  """Keeps activations split by rows.

  Left alone, the partitioner follows the parameters: it splits features over the fsdp axis, gathers all rows on every
  device and sums activations of the whole batch after every product.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gathered(kernel: Float[Array, "..."], axes: Sequence[str | None]) -> Float[Array, "..."]:
  """Gathers a kernel, except along the tensor axis, right before it is used.

  Left alone, a TPU multiplies by one device's slice after the other, each too thin for its matrix unit.

  Args:
    kernel: the kernel, in the dtype in which it should travel.
    axes: the logical name of each of its axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel
  by_tensor = {axis for axis, target in MeshSpec.rules if target == "tensor"}
  kept = (
    "tensor" if axis in by_tensor and length % mesh.shape["tensor"] == 0 else None
    for axis, length in zip(axes, kernel.shape, strict=True)
  )
  return lax.with_sharding_constraint(kernel, PartitionSpec(*kept))
