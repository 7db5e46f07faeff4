"""Costs of a compiled step: what one device computes, moves and sends, by part of the step."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from contrastive_jax.planning.hlo import Computation, Instruction, Module, Visit

Link = Callable[[list[int]], float]

# The named scopes of the train step; forward and backward passes count together.
PARTS = ("towers", "loss", "optimizer", "other")
_PART = re.compile(r"\b(towers|loss|optimizer)\b")
# What a hand-written kernel says of itself.
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_HAND_WRITTEN = re.compile(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "collective-permute",
  "all-to-all",
  "collective-broadcast",
)
KINDS = ("product", "copy", "other")
# What moves or lays out numbers and computes none.
_MOVES = {
  "copy", "copy-start", "copy-done", "transpose", "reshape", "slice", "slice-start", "slice-done", "dynamic-slice",
  "dynamic-update-slice", "concatenate", "pad", "reverse", "gather", "broadcast",
}  # fmt: skip
# These name arrays and move nothing, or their parts are visited one by one.
_NO_TRAFFIC = {
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
  "partition-id", "replica-id", "async-start", "async-update", "async-done", "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """The collectives of one kind in one part of the step.

  Attributes:
    kind: name of the collective, such as "all-gather".
    part: part of the step, one of `PARTS`.
    count: number of executions per step.
    bytes: bytes that a device sends in a step, in a ring of the devices that take part.
    seconds: duration of sending them if nothing else uses the links.
    largest: bytes of the largest array, as a device holds it before the collective.
  """

  kind: str
  part: str
  count: int = 0
  bytes: float = 0.0
  seconds: float = 0.0
  largest: float = 0.0

  def __add__(self, other: "Collective") -> "Collective":
    return dataclasses.replace(
      self,
      count=self.count + other.count,
      bytes=self.bytes + other.bytes,
      seconds=self.seconds + other.seconds,
      largest=max(self.largest, other.largest),
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel: a fusion, or an instruction by itself.

  Attributes:
    scope: the path of JAX scopes that it came from.
    kind: "product" when it multiplies matrices, "copy" when it only moves or lays out numbers, else "other".
    runs: number of launches per step.
    flops: floating-point operations of its matrix products, per launch.
    bytes: bytes that it reads and writes, per launch.
    cycles: the compiler's estimate of its cycles, per launch; 0 where there is none.
  """

  scope: str
  kind: str
  runs: float
  flops: float
  bytes: float
  cycles: float


@dataclasses.dataclass(frozen=True)
class Costs:
  """Costs of one step on one device.

  Attributes:
    flops: floating-point operations of matrix products, by part.
    flops_by_dtype: floating-point operations of matrix products, by (part, element type of the first operand).
    collectives: the collectives, by kind and part.
    kernels: all kernels that run.
    not_counted: number of hand-written kernels in the program that do not say what they compute, such as those of long
      rows; neither compiler says it for them.
  """

  flops: dict[str, float]
  flops_by_dtype: dict[tuple[str, str], float]
  collectives: list[Collective]
  kernels: list[Kernel]
  not_counted: int = 0

  @property
  def cycles(self) -> float:
    """The compiler's estimate of the cycles of all kernels together."""
    return sum((kernel.runs * kernel.cycles for kernel in self.kernels), 0.0)


def part_of(scope: str) -> str:
  """Returns the part of the step that a path of scopes belongs to."""
  found = _PART.search(scope)
  return found[1] if found else "other"


def analyse(module: Module, link: Link = lambda group: math.inf) -> Costs:
  """Adds up a module.

  Args:
    module: the compiled step.
    link: a function of the numbers of a group's devices that returns the bytes/s which each sends to the others.
  """
  flops, by_dtype = collections.Counter(), collections.Counter()
  collectives: dict[tuple[str, str], Collective] = {}
  kernels: list[Kernel] = []
  seen, not_counted = set(), 0
  for visit in module.visits():
    part = part_of(visit.scope)
    products = flops_of(visit.computation, visit.instruction)
    if products:
      flops[part] += visit.runs * products
      dtype = visit.computation.operand(visit.instruction, 0).shapes[0].dtype
      by_dtype[part, dtype] += visit.runs * products
    not_counted += not products and _HAND_WRITTEN.search(visit.instruction.attributes) is not None
    sent = _collective(module, visit, part, link)
    if sent is not None and not _is_copy(visit, sent.kind, seen):
      key = sent.kind, part
      collectives[key] = collectives.get(key, Collective(*key)) + sent
    if not visit.fused and visit.instruction.opcode not in _NO_TRAFFIC and sent is None:
      kernels.append(_kernel(module, visit))
  ordered = sorted(collectives.values(), key=lambda collective: -collective.bytes)
  return Costs(dict(flops), dict(by_dtype), ordered, kernels, not_counted)


def flops_of(computation: Computation, instruction: Instruction) -> float:
  """Counts the FLOPs (2 m n k) of a dot, a convolution or a call of a matrix library; 0 for anything else."""
  if instruction.opcode == "dot":
    return (
      2.0
      * instruction.shapes[0].size
      * _contracted(computation, instruction, _dims("lhs_contracting_dims", instruction))
    )
  if instruction.opcode == "convolution":
    return _convolution_flops(computation, instruction)
  if instruction.opcode == "custom-call" and (said := _ESTIMATE.search(instruction.attributes)):
    return float(said[1])
  if instruction.opcode == "custom-call" and "dot_dimension_numbers" in instruction.attributes:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    contracting = [int(value) for value in re.findall(r"\d+", found[1])]
    return 2.0 * instruction.shapes[0].size * _contracted(computation, instruction, contracting)
  return 0.0


def _contracted(computation: Computation, instruction: Instruction, contracting: Iterable[int]) -> int:
  left = computation.operand(instruction, 0).shapes[0].dims
  return math.prod(left[dim] for dim in contracting)


def _dims(name: str, instruction: Instruction) -> list[int]:
  found = re.search(rf"{name}=\{{([^}}]*)\}}", instruction.attributes)
  return [int(value) for value in found[1].split(",") if value] if found else []


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
  """Counts the FLOPs of a convolution.

  TPUs write matrix products as convolutions, and batch dimensions as dilated windows whose holes are not computed.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  left, kernel, out = (
    dict(zip(names, shape.dims, strict=True))
    for names, shape in zip(
      labels.groups(),
      (
        computation.operand(instruction, 0).shapes[0],
        computation.operand(instruction, 1).shapes[0],
        instruction.shapes[0],
      ),
      strict=True,
    )
  )
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(field.split("=") for field in window[1].split()) if window else {}
  positions = 1
  for axis in sorted(name for name in left if name.isdigit()):
    index = int(axis)

    def of(field: str, default: str, index: int = index) -> list[int]:
      values = fields[field].split("x") if field in fields else None
      return [int(value) for value in (values[index] if values else default).split("_")]

    positions *= _valid_positions(
      left[axis], kernel[axis], out[axis], of("stride", "1")[0], of("pad", "0_0")[0],
      of("lhs_dilate", "1")[0], of("rhs_dilate", "1")[0],
    )  # fmt: skip
  grouped = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  # The kernel's input features are already those of one feature group.
  return 2.0 * out["b"] * out["f"] * kernel["i"] * positions / (int(grouped[1]) if grouped else 1)


@functools.lru_cache(maxsize=4096)
def _valid_positions(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
  """Counts pairs of output and kernel positions along an axis that meet an element and neither padding nor a hole."""
  count = 0
  for tap in range(kernel):
    for position in range(out):
      at = position * stride - low + tap * kernel_dilate
      count += at >= 0 and at % dilate == 0 and at // dilate < size
  return count


def _collective(module: Module, visit: Visit, part: str, link: Link) -> Collective | None:
  instruction = visit.instruction
  kind = instruction.opcode.removesuffix("-start")
  if kind not in _COLLECTIVES:
    return None
  held = visit.computation.operand_bytes(instruction)
  # A TPU's reduce-scatter is a fusion of an all-reduce and the choice of a slice.
  if kind == "all-reduce" and "all-reduce-scatter" in visit.computation.name:
    kind = "reduce-scatter"
  group = _group(module, instruction)
  factor = {
    "all-gather": len(group) - 1,
    "all-reduce": 2 * (len(group) - 1) / len(group),
    "reduce-scatter": (len(group) - 1) / len(group),
    "all-to-all": (len(group) - 1) / len(group),
  }.get(kind, 1)
  sent = visit.runs * held * factor
  return Collective(kind, part, round(visit.runs), sent, sent / link(group), held)


def _is_copy(visit: Visit, kind: str, seen: set) -> bool:
  """Says whether a call is a further piece of a collective that the TPU compiler spreads over several fusions."""
  if "async_collective_fusion_config" not in visit.instruction.attributes:
    return False
  channel = re.search(r"channel_id=(\d+)", visit.instruction.attributes)
  key = (kind, channel and channel[1], visit.runs)
  copied = key in seen
  seen.add(key)
  return copied


def _group(module: Module, instruction: Instruction) -> list[int]:
  """Reads a group of devices that exchange data: listed, as an iota, as axes of a mesh, or as a pair."""
  text = instruction.attributes
  pairs = re.search(r"source_target_pairs=\{\{([\d,{}]+)\}\}", text)
  if pairs:
    # The widest hop sets the pace of a ring.
    hops = [[int(end) for end in hop.split(",")] for hop in pairs[1].split("},{")]
    return max(hops, key=lambda hop: abs(hop[0] - hop[1]))
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
  if listed:
    return [int(number) for number in listed[1].split(",")]
  iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", text)
  if iota:
    return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))[0].tolist()
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    along = re.findall(r"'([^']+)'", mesh[3])
    order = re.search(rf"device_ids=\({_IOTA}", mesh[2])
    devices = _iota(order[1], order[2]) if order else np.arange(math.prod(sizes.values()))
    devices = devices.reshape(tuple(sizes.values()))
    return devices[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist()
  return list(range(module.partitions))


def _iota(dims: str, order: str | None) -> np.ndarray:
  """Lists devices in the order that `[dims]T(order)` describes."""
  shape = [int(length) for length in dims.split(",")]
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices if order is None else devices.transpose([int(axis) for axis in order.split(",")])


def _kernel(module: Module, visit: Visit) -> Kernel:
  instruction = visit.instruction
  parts = list(_parts(module, visit.computation, instruction))
  products = sum((flops_of(computation, part) for computation, part in parts), 0.0)
  if instruction.opcode == "fusion":
    inner = module.computations[instruction.called("calls")]
    moved = _fusion_bytes(visit.computation, instruction, inner)
  else:
    moved = _plain_bytes(visit.computation, instruction)
  opcodes = {part.opcode for _, part in parts}
  kind = "product" if products else "copy" if opcodes - _NO_TRAFFIC <= _MOVES else "other"
  cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return Kernel(visit.scope, kind, visit.runs, products, moved, float(cycles[1]) if cycles else 0.0)


def _parts(
  module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """Yields an instruction, or those of a fusion and of the fusions within it, each with its computation."""
  if instruction.opcode != "fusion":
    yield computation, instruction
    return
  inner = module.computations[instruction.called("calls")]
  for part in inner.instructions.values():
    yield from _parts(module, inner, part)


def _plain_bytes(computation: Computation, instruction: Instruction) -> float:
  if instruction.opcode.endswith("-done"):
    return 0.0
  if instruction.opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * instruction.bytes
  if instruction.opcode == "dynamic-update-slice":
    return 2 * computation.operand(instruction, 1).bytes
  return instruction.bytes + computation.operand_bytes(instruction)


def _fusion_bytes(outer: Computation, fusion: Instruction, inner: Computation) -> float:
  """Counts the bytes that a fusion reads and writes.

  Of an array that it only slices, the slice counts, and of an array that it updates in place, the update.
  """
  users = collections.defaultdict(list)
  for instruction in inner.instructions.values():
    for position, name in enumerate(instruction.operands):
      users[name].append((position, instruction))
  read = 0.0
  for instruction in inner.instructions.values():
    if instruction.opcode == "parameter":
      read += min(instruction.bytes, _read_bytes(instruction, users))
  root = _through_bitcasts(inner, inner.root)
  written = (
    [_through_bitcasts(inner, inner.operand(root, i)) for i in range(len(root.operands))]
    if root.opcode == "tuple"
    else [root]
  )
  return read + sum(_written_bytes(inner, part) for part in written)


def _read_bytes(instruction: Instruction, users: dict) -> float:
  total = 0.0
  for position, user in users[instruction.name]:
    if user.opcode in ("bitcast", "reshape", "transpose", "copy") and user.bytes >= instruction.bytes:
      total += _read_bytes(user, users)
    elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
      total += user.bytes
    elif user.opcode == "dynamic-update-slice" and position == 0:
      continue
    else:
      return math.inf
  return total


def _written_bytes(inner: Computation, instruction: Instruction) -> float:
  if instruction.opcode == "dynamic-update-slice":
    return inner.operand(instruction, 1).bytes
  return instruction.bytes


def _through_bitcasts(inner: Computation, instruction: Instruction) -> Instruction:
  while instruction.opcode in ("bitcast", "copy", "reshape") and inner.operand(instruction, 0) is not None:
    instruction = inner.operand(instruction, 0)
  return instruction
