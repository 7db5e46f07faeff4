"""The losses alone, compiled for a TPU or GPU topology: temporaries, what they send, whether sending hides.

  .venv-plan/bin/python -m benchmarks.pods [--topology=v5e:16x16] [--sizes=32768,1048576] [--dim=768]
  .venv-plan/bin/python -m benchmarks.pods --groups=label,keys,none    # the price of comparing keys

Sums up forward and backward pass of one device. A send hides when the compiler starts it before a tile's products (or
the loop over them) and waits for it after.
"""

import os

# Before JAX starts: the compilers need no device.
os.environ["JAX_PLATFORMS"] = "cpu"

import collections
import itertools
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import groups
from contrastive_jax import losses
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec, ring_order
from contrastive_jax.planning import costs, hlo, topologies

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "As in plan.py.")
_SIZES = flags.DEFINE_list("sizes", ["32768", "1048576"], "Global numbers of pairs.")
_DIM = flags.DEFINE_integer("dim", 768, "Dimension of the embeddings.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the embeddings.")
_STRATEGIES = flags.DEFINE_list("strategies", ["ring", "gather"], "See the losses.")
_GROUPS = flags.DEFINE_list("groups", ["none"], f"What says which pairs are no negatives: {', '.join(groups.FORMS)}.")
_SAVE = flags.DEFINE_string("save_hlo", "", "A directory for the optimised programs.")


def compiled(
  name: str, pairs: int, dtype: str, strategy: str, form: str, topology: topologies.Topology
) -> jax.stages.Compiled:
  """Value and gradients of a loss on all devices of the topology; `form` is one of `groups.FORMS`."""
  mesh = MeshSpec().make(topology.devices())
  order = ring_order(mesh)

  def local(image, text, scale, bias, group=None):
    options = {"group": group, "axis_name": BATCH_AXES, "strategy": strategy, "ring_order": order}
    return losses.OBJECTIVES[name](image, text, logit_scale=scale, logit_bias=bias, **options)[0]

  split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
  group = groups.abstract(form, pairs, NamedSharding(mesh, split))
  specs = (split, split, everywhere, everywhere, *(split for _ in group))
  island = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere)
  side = jax.ShapeDtypeStruct((pairs, _DIM.value), dtype, sharding=NamedSharding(mesh, split))
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, everywhere))
  lowered = jax.jit(jax.value_and_grad(island, argnums=(0, 1, 2, 3))).lower(side, side, scalar, scalar, *group)
  return lowered.compile(compiler_options=topology.compiler_options)


def hidden_sends(module: hlo.Module) -> tuple[int, int]:
  """Returns how many permutes inside loops have a loop or a product between start and wait, and of how many."""
  hidden = total = 0
  loops = {visit.instruction.called("body") for visit in module.visits() if visit.instruction.opcode == "while"}
  for name in loops:
    computation = module.computations[name]
    working, started = 0, {}
    for instruction in computation.instructions.values():
      opcode = instruction.opcode
      total += opcode in ("collective-permute", "collective-permute-start")
      if opcode == "collective-permute-start":
        started[instruction.name] = working
      elif opcode == "collective-permute-done":
        hidden += working > started[instruction.operands[0]]
      working += opcode == "while" or _multiplies(module, computation, instruction)
  return hidden, total


def _multiplies(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> bool:
  if instruction.opcode != "fusion":
    return costs.flops_of(computation, instruction) > 0
  inner = module.computations[instruction.called("calls")]
  return any(costs.flops_of(inner, part) > 0 for part in inner.instructions.values())


def main(_) -> None:
  topology = topologies.find(_TOPOLOGY.value)
  titles = (
    "loss", "pairs", "embeddings", "strategy", "groups", "MiB of temporaries", "MiB sent", "sends that hide",
    "ms computing", "of the first", "s to compile",
  )  # fmt: skip
  print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
  for pairs in map(int, _SIZES.value):
    for name, strategy, dtype in itertools.product(losses.OBJECTIVES, _STRATEGIES.value, _DTYPES.value):
      first = 0.0
      for form in _GROUPS.value:
        began = time.perf_counter()
        program = compiled(name, pairs, dtype, strategy, form, topology)
        seconds, text = time.perf_counter() - began, program.as_text()
        if _SAVE.value:
          path = os.path.join(_SAVE.value, f"{name}_{pairs}_{strategy}_{dtype}_{form}.txt")
          with open(path, "w") as file:
            file.write(text)
        module = hlo.parse(text)
        found = costs.analyse(module, topology.link)
        first = first or found.cycles
        sent = collections.Counter()
        for collective in found.collectives:
          sent[collective.kind] += collective.bytes / 2**20
        hidden, total = hidden_sends(module)
        clock = topology.chip.clock
        cells = (
          name,
          f"{pairs:,}",
          dtype,
          strategy,
          form,
          f"{program.memory_analysis().temp_size_in_bytes / 2**20:,.1f}",
          ", ".join(f"{kind} {amount:,.0f}" for kind, amount in sent.items() if amount >= 0.5),
          f"{hidden} of {total}" if total else "",
          f"{1e3 * found.cycles / clock:,.3f}" if clock else "",
          f"{found.cycles / first:.3f}" if clock else "",
          f"{seconds:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  app.run(main)
