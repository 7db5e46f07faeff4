"""The kernels of a compiled step by where they come from: what its time goes into."""

import collections
import re
from typing import Any

from contrastive_jax.planning.costs import KINDS, Costs, Kernel
from contrastive_jax.planning.topologies import Chip

# What transformations of JAX add to a path of scopes.
_WRAPPED = re.compile(r"\w+\(([^()]*)\)")
_ADDED = {"", "while", "body", "closed_call", "checkpoint", "rematted_computation", "remat", "shard_map"}


def seconds(kernel: Kernel, chip: Chip) -> float:
  """Returns the duration of all runs of a kernel.

  On a TPU it is what the compiler expects; of a hand-written kernel, of which it expects nothing, the arithmetic at
  peak and then the memory traffic at full bandwidth. Elsewhere the two overlap: it is the longer of them.
  """
  arithmetic, traffic = kernel.flops / chip.flops, kernel.bytes / chip.bandwidth
  if not chip.clock:
    return kernel.runs * max(arithmetic, traffic)
  if kernel.flops and not kernel.cycles:
    return kernel.runs * (arithmetic + traffic)
  return kernel.runs * kernel.cycles / chip.clock


def computing_seconds(found: Costs, chip: Chip) -> float:
  """Returns the duration of all kernels of a step, one after the other."""
  return sum(seconds(kernel, chip) for kernel in found.kernels)


def shares(found: Costs, chip: Chip) -> dict[str, float]:
  """Returns the share of the step's computing time that each kind of kernel takes."""
  total = collections.Counter(dict.fromkeys(KINDS, 0.0))
  for kernel in found.kernels:
    total[kernel.kind] += seconds(kernel, chip)
  return {kind: amount / total.total() for kind, amount in total.items()}


def dearest(found: Costs, chip: Chip, count: int) -> list[dict[str, Any]]:
  """Lists what takes the most time; kernels of the same scope, pass and kind are one row, whatever layer they are in.

  Args:
    found: the costs of the step.
    chip: the chip that runs it.
    count: number of rows.

  Returns:
    Of each row "scope", "pass" ("forward", "backward", or "again" for what is recomputed), "kind", and of all its runs
    in a step on one device "runs", "cycles", "seconds", "share" of the computing time, "flops" and "bytes".
  """
  rows: dict[tuple[str, str, str], dict[str, Any]] = {}
  total = computing_seconds(found, chip)
  for kernel in found.kernels:
    key = named(kernel.scope), pass_of(kernel.scope), kernel.kind
    row = rows.setdefault(key, dict.fromkeys(("runs", "cycles", "seconds", "share", "flops", "bytes"), 0.0))
    taken = seconds(kernel, chip)
    row["runs"] += kernel.runs
    row["cycles"] += kernel.runs * kernel.cycles
    row["seconds"] += taken
    row["share"] += taken / total
    row["flops"] += kernel.runs * kernel.flops
    row["bytes"] += kernel.runs * kernel.bytes
  ordered = sorted(rows.items(), key=lambda item: -item[1]["seconds"])[:count]
  return [{"scope": scope, "pass": direction, "kind": kind, **row} for (scope, direction, kind), row in ordered]


def pass_of(scope: str) -> str:
  """Says whether a path of scopes lies in the "forward" or "backward" pass, or is forward computation done "again"."""
  if "rematted_computation" in scope:
    return "again"
  return "backward" if "transpose(" in scope else "forward"


def named(scope: str) -> str:
  """Returns a path of scopes without what JAX adds to it.

  "jit(update)/transpose(jvp(towers))/while/body/checkpoint/mlp/dot_general" becomes "towers/mlp/dot_general".
  """
  _, _, path = scope.partition("/")
  while _WRAPPED.search(path):
    path = _WRAPPED.sub(r"\1", path)
  return "/".join(name for name in path.split("/") if name not in _ADDED)
