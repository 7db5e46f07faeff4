"""The losses alone, compiled for a TPU or GPU topology: temporaries, what they send, whether sending hides.

  .venv-plan/bin/python -m benchmarks.pods [--topology=v5e:16x16] [--sizes=32768,1048576] [--dim=768]

Sums up forward and backward pass of one device. A send hides when the compiler starts it before a tile's products (or
the loop over them) and waits for it after.
"""

import os

# Before JAX starts: the compilers need no device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import collections
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from contrastive_jax import losses
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec, ring_order
from contrastive_jax.planning import costs, hlo, topologies

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "As in plan.py.")
_SIZES = flags.DEFINE_list("sizes", ["32768", "1048576"], "Global numbers of pairs.")
_DIM = flags.DEFINE_integer("dim", 768, "Dimension of the embeddings.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the embeddings.")
_STRATEGIES = flags.DEFINE_list("strategies", ["ring", "gather"], "See the losses.")
_SAVE = flags.DEFINE_string("save_hlo", "", "A directory for the optimised programs.")


def compiled(name: str, pairs: int, dtype: str, strategy: str, topology: topologies.Topology) -> jax.stages.Compiled:
  """Value and gradients of a loss on all devices of the topology."""
  mesh = MeshSpec().make(topology.devices())
  order = ring_order(mesh)

  def local(image, text, scale, bias):
    options = {"axis_name": BATCH_AXES, "strategy": strategy, "ring_order": order}
    return losses.OBJECTIVES[name](image, text, logit_scale=scale, logit_bias=bias, **options)[0]

  split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
  island = jax.shard_map(local, mesh=mesh, in_specs=(split, split, everywhere, everywhere), out_specs=everywhere)
  side = jax.ShapeDtypeStruct((pairs, _DIM.value), dtype, sharding=NamedSharding(mesh, split))
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, everywhere))
  lowered = jax.jit(jax.value_and_grad(island, argnums=(0, 1, 2, 3))).lower(side, side, scalar, scalar)
  return lowered.compile(compiler_options=topology.compiler_options)


def hidden_sends(module: hlo.Module) -> tuple[int, int]:
  """How many of the permutes inside loops have a loop or a matrix product between start and wait, and of how many."""
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
  print(
    "| loss | pairs | embeddings | strategy | MiB of temporaries | MiB sent | sends that hide | ms computing"
    " | s to compile |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  for pairs in map(int, _SIZES.value):
    for name in losses.OBJECTIVES:
      for strategy in _STRATEGIES.value:
        for dtype in _DTYPES.value:
          began = time.perf_counter()
          program = compiled(name, pairs, dtype, strategy, topology)
          seconds, text = time.perf_counter() - began, program.as_text()
          if _SAVE.value:
            path = os.path.join(_SAVE.value, f"{name}_{pairs}_{strategy}_{dtype}.txt")
            with open(path, "w") as file:
              file.write(text)
          module = hlo.parse(text)
          found = costs.analyse(module, topology.link)
          sent = collections.Counter()
          for collective in found.collectives:
            sent[collective.kind] += collective.bytes / 2**20
          bytes_sent = ", ".join(f"{kind} {amount:,.0f}" for kind, amount in sent.items() if amount >= 0.5)
          hidden, total = hidden_sends(module)
          computing = f"{1e3 * found.cycles / topology.chip.clock:,.2f}" if topology.chip.clock else ""
          temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
          cells = (name, f"{pairs:,}", dtype, strategy, f"{temporaries:,.1f}", bytes_sent)
          print(
            f"| {' | '.join(cells)} | {f'{hidden} of {total}' if total else ''} | {computing} | {seconds:.0f} |",
            flush=True,
          )


if __name__ == "__main__":
  app.run(main)
