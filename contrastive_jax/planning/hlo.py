"""Reads the text of an optimised HLO module: its instructions, what they call, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Towers loop over depth, losses over tiles and the ring: here
every instruction is visited with the product of the trip counts of the loops around it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM_BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_REFERENCE = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%?([\w.\-]+)\s*$")


@dataclasses.dataclass(frozen=True)
class Shape:
  """The element type and the dimensions of an array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """The number of bytes, without the padding of the device's layout."""
    # Eight-bit floats have many names.
    return float(self.size * _ITEM_BYTES.get(self.dtype, 1))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: name of the instruction, unique in its computation.
    opcode: name of the operation, such as "dot" or "all-gather-start".
    shapes: the arrays of its result, several for a tuple.
    operands: names of instructions of the same computation; for a constant, its value.
    attributes: the text that follows the operands.
    root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @property
  def bytes(self) -> float:
    return sum((shape.bytes for shape in self.shapes), 0.0)

  @property
  def op_name(self) -> str:
    """The path of JAX scopes that it came from; empty when XLA added it."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found[1] if found else ""

  def called(self, role: str) -> str | None:
    """Returns the name of the computation that it uses as "calls", "body", "condition" or "to_apply"."""
    return next((name for kind, name in _REFERENCE.findall(self.attributes) if kind == role), None)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A computation: its instructions by name."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.root)

  def operand(self, instruction: Instruction, index: int) -> Instruction | None:
    """Returns the instruction that makes an operand."""
    return self.instructions.get(instruction.operands[index])

  def operand_bytes(self, instruction: Instruction) -> float:
    return sum((self.instructions[name].bytes for name in instruction.operands if name in self.instructions), 0.0)


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction at a place where it runs.

  Attributes:
    computation: the computation that holds it.
    instruction: the instruction.
    runs: number of times it runs in one execution of the module.
    fused: whether it is part of a fusion, whose intermediate arrays are never stored.
    scope: its JAX scopes or, when it has none, those of its operands or of its caller.
  """

  computation: Computation
  instruction: Instruction
  runs: float
  fused: bool
  scope: str


@dataclasses.dataclass(frozen=True)
class Module:
  """An HLO module."""

  computations: dict[str, Computation]
  entry: str
  partitions: int

  def visits(self) -> Iterator[Visit]:
    """Yields every instruction reachable from the entry. All branches of a conditional count."""
    yield from self._visit(self.entry, 1.0, False, "")

  def _visit(self, name: str, runs: float, fused: bool, scope: str) -> Iterator[Visit]:
    computation = self.computations[name]
    for instruction in computation.instructions.values():
      here = _scope(computation, instruction) or scope
      yield Visit(computation, instruction, runs, fused, here)
      opcode = instruction.opcode
      if opcode == "while":
        trips = self.trip_count(computation, instruction)
        yield from self._visit(instruction.called("body"), runs * trips, fused, here)
      elif opcode == "conditional":
        for branch in _branches(instruction):
          yield from self._visit(branch, runs, fused, here)
      elif opcode == "call":
        yield from self._visit(instruction.called("to_apply"), runs, fused, here)
      elif opcode in ("fusion", "async-start") and instruction.called("calls"):
        yield from self._visit(instruction.called("calls"), runs, fused or opcode == "fusion", here)

  def trip_count(self, computation: Computation, loop: Instruction) -> int:
    """Counts the iterations of a `while`, as the compiler notes them or else from its counter; 1 if that is unclear."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
      return int(noted[1])
    condition = self.computations[loop.called("condition")]
    compare, inputs = condition.root, list(condition.root.operands)
    if compare.opcode == "fusion":
      compare = self.computations[compare.called("calls")].root
    limits = [_constant(condition.instructions.get(name)) for name in inputs]
    limit = next((value for value in limits if value is not None), None)
    counter = next((i for i in map(condition.instructions.get, inputs) if i and i.opcode == "get-tuple-element"), None)
    if limit is None or counter is None:
      return 1
    index = _tuple_index(counter)
    start = self._start(computation, loop, index)
    step = self._step(self.computations[loop.called("body")], index)
    inclusive = "direction=LE" in compare.attributes
    return max(0, math.ceil((limit + inclusive - start) / step))

  def _start(self, computation: Computation, loop: Instruction, index: int) -> int:
    carry = computation.operand(loop, 0)
    if carry is None or carry.opcode != "tuple":
      return 0
    return _constant(computation.operand(carry, index)) or 0

  def _step(self, body: Computation, index: int) -> int:
    """Returns the number that the body adds to its counter."""
    if body.root.opcode != "tuple":
      return 1
    return self._increment(body, body.operand(body.root, index)) or 1

  def _increment(self, computation: Computation, instruction: Instruction | None) -> int:
    if instruction is None:
      return 0
    if instruction.opcode == "fusion":
      inner = self.computations[instruction.called("calls")]
      return self._increment(inner, inner.root)
    if instruction.opcode in ("copy", "bitcast"):
      return self._increment(computation, computation.operand(instruction, 0))
    if instruction.opcode != "add":
      return 0
    total = 0
    for index in (0, 1):
      part = computation.operand(instruction, index)
      constant = _constant(part)
      total += self._increment(computation, part) if constant is None else constant
    return total


def parse(text: str) -> Module:
  """Parses `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  # What a kernel says of itself may run over several lines.
  text = re.sub(r"kernel_metadata=\{\n(?:.*\n)*?\}", "kernel_metadata={}", text)
  for line in text.splitlines():
    if line.startswith("}"):
      current = None
    elif current is not None:
      instruction = _instruction(line)
      if instruction is not None:
        current.instructions[instruction.name] = instruction
    elif line.endswith("{") and not line.startswith("HloModule"):
      name = re.match(r"(?:ENTRY\s+)?%?([\w.\-]+)", line)[1]
      current = computations[name] = Computation(name, {})
      if line.startswith("ENTRY"):
        entry = name
  partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def shapes(text: str) -> tuple[Shape, ...]:
  """Reads the arrays of a printed type; the bound of a dynamic dimension counts."""
  return tuple(
    Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
    for dtype, dims in _SHAPE.findall(text)
  )


def _instruction(line: str) -> Instruction | None:
  left, equals, right = line.partition(" = ")
  if not equals:
    return None
  end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
  kind, rest = right[:end], right[end:].lstrip()
  opcode, _, _ = rest.partition("(")
  close = _closing(rest, len(opcode))
  operands = rest[len(opcode) + 1 : close]
  if opcode == "constant":
    names = (operands,)
  else:
    names = tuple(found[1] for part in _split(operands) if (found := _NAME.search(part)))
  name = _NAME.search(left)[1]
  return Instruction(name, opcode, shapes(kind), names, rest[close + 1 :], left.lstrip().startswith("ROOT"))


def _closing(text: str, start: int) -> int:
  """Finds the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  return len(text)


def _split(operands: str) -> list[str]:
  """Splits at the commas outside brackets: older text repeats the operands' types."""
  if "[" not in operands and "(" not in operands:
    return operands.split(",")
  parts, depth, start = [], 0, 0
  for index, character in enumerate(operands):
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth == 0:
      parts.append(operands[start:index])
      start = index + 1
  return [*parts, operands[start:]]


def _branches(instruction: Instruction) -> list[str]:
  listed = _BRANCHES.search(instruction.attributes)
  if listed:
    return [name.strip().lstrip("%") for name in listed[1].split(",")]
  named = [instruction.called(role) for role in ("true_computation", "false_computation")]
  return [name for name in named if name]


def _scope(computation: Computation, instruction: Instruction) -> str:
  """Returns the scopes of an instruction, or else those of its operands: merged collectives have none."""
  level = [instruction]
  for _ in range(4):
    named = next((made.op_name for made in level if made.op_name), "")
    if named:
      return named
    level = [
      computation.instructions[name] for made in level for name in made.operands if name in computation.instructions
    ]
  return ""


def _constant(instruction: Instruction | None) -> int | None:
  """Reads the value of an integer constant, through copies."""
  if instruction is None or instruction.opcode != "constant":
    return None
  return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def _tuple_index(instruction: Instruction) -> int:
  return int(re.search(r"index=(\d+)", instruction.attributes)[1])
