"""What the terms of an objective cost: memory that they need beside their gradients, and time beside the softmax loss.

  python -m benchmarks.objective_costs                          # all of them; some minutes on two cores
  python -m benchmarks.objective_costs --terms=softmax,pamc --write

Memory is XLA's own figure of temporaries, for --pairs on one device. Times are processor time of value and gradients
for --timed_pairs, in turns, and medians of what each turn gives relative to softmax. --write puts the rows into the
table in docs/.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.timing import taking_turns
from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.objectives import Sizes, make_objective
from contrastive_jax.objectives.objective import axes, create
from contrastive_jax.parallel.mesh import MeshSpec, put_batch

BASE = "softmax"
# Each: the term, and its options where they are not the defaults. Their label is what stands in a config.
TERMS: Mapping[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
  "`softmax`": ("softmax", {}),
  "`sigmoid`": ("sigmoid", {}),
  "`softmax.hard_top_k = 64`": ("softmax", {"softmax": {"hard_top_k": 64}}),
  "`softmax.hard_share = 0.08`": ("softmax", {"softmax": {"hard_share": 0.08}}),
  "`softmax.mean_negatives = True`": ("softmax", {"softmax": {"mean_negatives": True}}),
  "`softmax.clusters = (100, 300)`": ("softmax", {"softmax": {"clusters": (100, 300)}}),
  "`dcl`": ("dcl", {}),
  "`dcl.intra_modal = True`": ("dcl", {"dcl": {"intra_modal": True}}),
  "`cwcl`": ("cwcl", {}),
  "`mann_whitney`": ("mann_whitney", {}),
  "`mv_infonce`": ("mv_infonce", {}),
  "`mv_dhel`": ("mv_dhel", {}),
  "`cacr`": ("cacr", {}),
  '`cacr.cost = "rbf"`': ("cacr", {"cacr": {"cost": "rbf"}}),
  "`gram`": ("gram", {}),
  "`groco`": ("groco", {}),
  "`mochi`": ("mochi", {}),
  "`mixup`": ("mixup", {}),
  "`soft_clip`": ("soft_clip", {}),
  "`simlap`": ("simlap", {}),
  "`margin_regularizer`": ("margin_regularizer", {}),
  "`pamc.clusters = 64`": ("pamc", {"pamc": {"clusters": 64}}),
  "`swapped_prototypes.prototypes = 1000`": ("swapped_prototypes", {"swapped_prototypes": {"prototypes": 1000}}),
  "`barlip`": ("barlip", {}),
  "`uniformity`": ("uniformity", {}),
  "`cross_uniformity`": ("cross_uniformity", {}),
  "`individual_temperatures`": ("individual_temperatures", {}),
  "`sogclr`": ("sogclr", {}),
  "`queued_softmax.size = 16384`": ("queued_softmax", {"queued_softmax": {"size": 16384}}),
  "`matryoshka` of `softmax`": ("matryoshka", {}),
  "`multi_head` of `softmax`": ("multi_head", {}),
  "`fixed_head` of `softmax`": ("fixed_head", {}),
}
# Comparisons of every pair with every two others: neither fits the minutes that all the others take.
CUBIC = ("mann_whitney",)
PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
_BEGIN, _END = "<!-- table of benchmarks.objective_costs -->", "<!-- / -->"


def batch_of(pairs: int, samples: int) -> Batch:
  """Returns a batch of which terms read the keys and the rows of their state."""
  image = ImageBatch(np.zeros((pairs, 1, 3), np.uint8), np.zeros((pairs, 1, 3), np.int16))
  text = TextBatch(np.zeros((pairs, 1), np.int32), np.ones((pairs, 1), bool))
  rng = np.random.default_rng(0)
  keys = rng.integers(0, 2**32, (pairs, 2, 2), np.uint32)
  return Batch(image, text, keys, state_rows=rng.permutation(samples)[:pairs].astype(np.int32))


def program(
  term: str, options: Mapping[str, Mapping[str, Any]], pairs: int, dim: int
) -> tuple[Any, Callable[[], tuple[Any, ...]]]:
  """Compiles value and gradients of a term, and returns it with a function that makes its arguments."""
  mesh, samples = MeshSpec().make(jax.devices()[:1]), 2 * pairs
  sizes = Sizes(dim, samples=samples, pairs=pairs)
  # Not make_objective's check that something separates: what is measured is the term alone.
  whole = make_objective({BASE: 1.0, term: 1.0}, options)
  objective = type(whole)({term: whole.terms[term]})
  learned, remembered = objective.params(sizes), objective.state(sizes)
  batch = put_batch(mesh, batch_of(pairs, samples))

  def loss(embeddings, params, scale, bias, state, batch):
    return objective.global_loss(
      embeddings, batch, scale, bias, mesh, params=params, state=state, state_axes=axes(remembered)
    )

  def arguments() -> tuple[Any, ...]:
    sides = np.random.default_rng(1).standard_normal((2, pairs, dim), np.float32)
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    embeddings = dict(zip(("image", "text"), map(jnp.asarray, sides), strict=True))
    key = jax.random.key(0)
    made = (create(variables, key) for variables in (learned, remembered))
    params, state = jax.jit(lambda: tuple(made))()
    return embeddings, params, jnp.float32(10.0), jnp.float32(-10.0), state, batch

  gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
  with jax.set_mesh(mesh):
    return gradients.lower(*jax.eval_shape(arguments)).compile(), arguments


def rows_of(memory: Mapping[str, float], times: Mapping[str, float]) -> dict[str, str]:
  """Returns the rows of the table in Markdown, from MiB and from ratios by label."""
  rows = {}
  for label, size in memory.items():
    time = f"{times[label]:.1f}" if label in times else "not run: it grows with pairs³"
    rows[label] = f"| {label} | {size:,.0f} MiB | {time} |"
  return rows


def table(rows: Mapping[str, str]) -> str:
  """Returns the table in Markdown."""
  head = f"| term | memory, {_PAIRS.value:,} pairs | time, {_TIMED.value:,} pairs |"
  return "\n".join((head, "|---|---|---|", *rows.values()))


def main(_) -> None:
  known = {name for name, _ in TERMS.values()}
  for name in _TERMS.value:
    if name not in known:
      sys.exit(f"--terms names {name!r}: known are {', '.join(sorted(known))}")
  chosen = {label: entry for label, entry in TERMS.items() if entry[0] in {BASE, *_TERMS.value}}
  memory, runs = {}, {}
  for label, (term, options) in chosen.items():
    compiled, _ = program(term, options, _PAIRS.value, _DIM.value)
    memory[label] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if term not in CUBIC:
      timed, arguments = program(term, options, _TIMED.value, _TIMED_DIM.value)
      given = arguments()
      runs[label] = lambda timed=timed, given=given: timed(*given)
    print(f"{label}: {memory[label]:,.0f} MiB", flush=True)
  processor = taking_turns(list(runs.values()), _REPEATS.value)[..., 1]
  times = dict(zip(runs, np.median(processor / processor[0], axis=1), strict=True))
  rows = rows_of(memory, times)
  print(table(rows))
  if _WRITE.value:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    there, _, after = rest.partition(_END)
    earlier = {label: line for line in there.splitlines() for label in TERMS if line.startswith(f"| {label} |")}
    kept = {label: rows.get(label, earlier.get(label)) for label in TERMS if label in rows or label in earlier}
    PAGE.write_text(f"{before}{_BEGIN}\n{table(kept)}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  _TERMS = flags.DEFINE_list("terms", sorted({name for name, _ in TERMS.values()}), "Which of them to measure.")
  _PAIRS = flags.DEFINE_integer("pairs", 16_384, "Pairs for which memory is said.", lower_bound=2)
  _DIM = flags.DEFINE_integer("dim", 512, "Size of the embeddings there.", lower_bound=2)
  _TIMED = flags.DEFINE_integer("timed_pairs", 4096, "Pairs for which time is said.", lower_bound=2)
  _TIMED_DIM = flags.DEFINE_integer("timed_dim", 256, "Size of the embeddings there.", lower_bound=2)
  _REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each.", lower_bound=1)
  _WRITE = flags.DEFINE_bool("write", False, "Put the rows into docs/.")
  app.run(main)
