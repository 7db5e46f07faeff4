"""Hardware to plan for: the figures of chips, and devices of a topology that this machine need not have."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from contrastive_jax.errors import UserError, nearest

GIB = float(2**30)
# Chips of a whole pod.
_LARGEST = {"v5e": 256, "v6e": 256, "v5p": 8960}
# What the TPU compiler reads when it is loaded: it is on no TPU, asks no server for one, and may run several times.
_ALONE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-256",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FORMS = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "h100:8", "h100:4x8", "cpu:8")


@dataclasses.dataclass(frozen=True)
class Chip:
  """The vendor's figures of one device.

  Attributes:
    name: marketing name of the chip, such as "TPU v5e".
    memory: bytes of memory; 0 is unknown.
    reserve: bytes of memory that the runtime keeps: libtpu's own share, or CUDA's and NCCL's.
    flops: peak bf16 FLOP/s of matrix products; 0 is unknown.
    bandwidth: bytes/s between the chip and its memory.
    link: bytes/s that a device sends over all its links to its slice (ICI) or host (NVLink), in one direction.
    clock: frequency of the TensorCore in Hz, by which the TPU compiler counts cycles; 0 where it counts none.
    network: bytes/s of the device's own card to other hosts, where hosts are not part of one slice.
    links: number of links that `link` is spread over, each shared by two devices; 1 where a switch joins them.
  """

  name: str
  memory: float
  reserve: float
  flops: float
  bandwidth: float
  link: float
  clock: float = 0.0
  network: float = 0.0
  links: int = 1


# TPU: cloud.google.com/tpu/docs (v5e, v5p, v6e); the clock follows from the peak and the size of the matrix units, and
# the reserve is what libtpu's compiler keeps of each memory. H100: NVIDIA's data sheet of the SXM card,
# with a 400 Gbit/s network card each.
CHIPS = {
  "v5e": Chip("TPU v5e", 16 * GIB, 0.25 * GIB, 197e12, 819e9, 200e9, 197e12 / (4 * 128 * 128 * 2), links=4),
  "v5p": Chip("TPU v5p", 95 * GIB, 0.26 * GIB, 459e12, 2765e9, 600e9, 459e12 / (8 * 128 * 128 * 2), links=6),
  "v6e": Chip("TPU v6e", 32 * GIB, 0.25 * GIB, 918e12, 1640e9, 448e9, 918e12 / (4 * 256 * 256 * 2), links=4),
  "h100": Chip("NVIDIA H100 SXM", 84978434048.0, 5 * GIB, 989e12, 3350e9, 450e9, network=50e9),
  "cpu": Chip("emulated CPU device", 0.0, 0.0, 0.0, 0.0, 0.0),
}

# What XLA's GPU compiler asks the driver for. The figures are those that the driver of an H100 SXM gives.
_H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind.

  Attributes:
    name: name of the topology, as the command line gives it.
    kind: name of the chip in `CHIPS`.
    sizes: the torus dimensions on TPU; (hosts, devices per host) on GPU, or the devices alone where there is one host.
  """

  name: str
  kind: str
  sizes: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def device_count(self) -> int:
    return math.prod(self.sizes)

  def link(self, group: Sequence[int]) -> float:
    """Returns the bytes/s at which devices pass data around a group, given by their numbers, host after host."""
    hosts = {device // self.sizes[-1] for device in group} if self.chip.network else {0}
    if len(hosts) == 1:
      shared = self.chip.links if len(group) == 2 else 1
      return self.chip.link / shared or math.inf
    # The group's devices on a host share the work of crossing: each has its card.
    return min(self.chip.link, self.chip.network * len(group) / len(hosts))

  @property
  def compiler_options(self) -> dict[str, bool]:
    """The options that let this compiler do without the hardware."""
    # Choosing the tiles of Triton's matrix products takes a GPU to try them on; cuBLAS chooses at run time.
    return {"xla_gpu_enable_triton_gemm": False} if self.kind == "h100" else {}

  def devices(self) -> Sequence[jax.Device]:
    """Returns the devices to compile for.

    Raises:
      UserError: for a missing package, or a shape that the compiler does not know.
    """
    if self.kind == "cpu":
      return _cpu_devices(self)
    package = "jax_cuda13_plugin" if self.kind == "h100" else "libtpu"
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"--topology={self.name} needs the package {package}: run `make plan` once, then .venv-plan/bin/python plan.py"
      )
    try:
      if self.kind == "h100":
        shape = "x".join(str(size) for size in (1, *((1,) * (2 - len(self.sizes))), *self.sizes))
        found = topologies.get_topology_desc(
          platform="cuda", topology_name=shape, topology=shape, target_config=_H100_TARGET
        )
      else:
        for name, value in _ALONE.items():
          os.environ.setdefault(name, value)
        found = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
    except (RuntimeError, ValueError) as error:
      reason = str(error).strip().splitlines()[0]
      raise UserError(
        f"--topology={self.name} is refused by the compiler ({reason}): try {_example(self.kind)}"
      ) from None
    return found.devices


def find(name: str) -> Topology:
  """Returns the topology called `name`.

  Raises:
    UserError: for a name of another form, with the known forms.
  """
  kind, _, shape = name.partition(":")
  dimensions = {"v5e": (2,), "v6e": (2,), "v5p": (3,), "h100": (1, 2), "cpu": (1,)}
  sizes = tuple(int(size) for size in shape.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else ()
  if kind not in dimensions or len(sizes) not in dimensions[kind]:
    hint = f" (did you mean '{_example(kind)}'?)" if kind in dimensions else nearest(name, FORMS)
    raise UserError(
      f"--topology='{name}' is unknown{hint}: the forms are v5e:XxY, v6e:XxY, v5p:XxYxZ (TPU chips), h100:N or"
      " h100:HOSTSxN (GPUs), cpu:N (emulated)"
    )
  if kind in _LARGEST and math.prod(sizes) > _LARGEST[kind]:
    raise UserError(f"--topology='{name}' has {math.prod(sizes)} chips: a {kind} slice has at most {_LARGEST[kind]}")
  return Topology(name, kind, sizes)


def _example(kind: str) -> str:
  return next(form for form in FORMS if form.startswith(kind))


def _cpu_devices(topology: Topology) -> Sequence[jax.Device]:
  with contextlib.suppress(RuntimeError):  # Once JAX has started, what it has must do.
    jax.config.update("jax_num_cpu_devices", topology.device_count)
  devices = jax.devices("cpu")
  if len(devices) < topology.device_count:
    raise UserError(
      f"--topology={topology.name} needs {topology.device_count} CPU devices, JAX started with {len(devices)}"
    )
  return devices[: topology.device_count]
