"""Time of the whole train step - towers, loss, gradients, optimiser - next to big_vision's and to one in eager PyTorch.

  python -m benchmarks.step                       # ViT-S/16 at 64 pixels, text 384 x 6 of 16 tokens, batch 64
  python -m benchmarks.step --big_vision=DIR      # a checkout of github.com/google-research/big_vision, same towers
  python -m benchmarks.step --torch               # the same towers in eager PyTorch, where torch can be imported
  python -m benchmarks.step --remat=none,dots,full
  .venv-plan/bin/python -m benchmarks.step --topology=v5e:2x2 --preset=siglip_b16 --image_size=224 --text_length=64 \
    --text_depth=12 --batch=512 --dtype=bfloat16 --remat=none,full --unroll=1,12 --big_vision=DIR

The contestants take turns, one step each, on one batch that lies on the device; figures are medians. Only ratios of one
invocation mean anything. Where other programs share the processors, the processor time is the steadier figure (on an
accelerator it means nothing). Model FLOPs are those of the matrix products, three times the forward pass, also where
more is computed; the peak is the best large matrix product of the same invocation.

With --topology the steps are compiled for those devices, which need not be there, and not run: `plan.py`'s estimate of
each (on TPUs the sum of the compiler's cycles) on the same chips, every device with all of the state.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from benchmarks import peers
from benchmarks.timing import taking_turns
from configs import common
from contrastive_jax.batch import Batch, TextBatch
from contrastive_jax.models import flops
from contrastive_jax.parallel.mesh import batch_sharding
from contrastive_jax.planning import costs, hlo, kernels, topologies
from contrastive_jax.planning.compiling import compile_step
from contrastive_jax.planning.topologies import GIB, Topology
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.training.run import Run

_BATCH = flags.DEFINE_integer("batch", 64, "Pairs a step.")
_PRESET = flags.DEFINE_string("preset", "siglip_s16", "Towers; big_vision runs beside SigLIP's only.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Side of an image in pixels.")
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 16, "Tokens of a caption.")
_TEXT_DEPTH = flags.DEFINE_integer("text_depth", 6, "Blocks of the text tower.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_REMAT = flags.DEFINE_list("remat", ["dots"], "What ours recomputes: none, dots, full, or names of what it keeps.")
_BIG_VISION = flags.DEFINE_string("big_vision", "", "A checkout of big_vision to run beside ours.")
_TORCH = flags.DEFINE_bool("torch", False, "Run the same towers in eager PyTorch beside ours.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "Devices to compile for, such as v5e:2x2; none runs it here.")
_UNROLL = flags.DEFINE_list("unroll", ["1"], "Blocks in one turn of our loop over depth.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps of each.")
_MATMUL = flags.DEFINE_integer("matmul", 2048, "Side of the square matrices whose product gives the peak.")


# How big_vision runs its blocks: names of ours, and fields of its towers.
_BLOCKS = {
  "unrolled, remat none": {},
  "scanned, remat dots": {"scan": True, "remat_policy": "dots_with_no_batch_dims_saveable"},
  "scanned, remat full": {"scan": True, "remat_policy": "nothing_saveable"},
}


def run(remat: str, unroll: int = 1) -> ConfigDict:
  """Returns the config of our run."""
  config = common.get_config()
  config.data.sources = ConfigDict({"random": 1.0})  # What is drawn here; nothing reads it.
  config.model = common.model(_PRESET.value)
  config.model.image.image_size = _IMAGE_SIZE.value
  config.model.text.length = _TEXT_LENGTH.value
  config.model.text.transformer.depth = _TEXT_DEPTH.value
  for tower in (config.model.image, config.model.text):
    tower.transformer.remat = remat
    tower.transformer.unroll = unroll
  config.batch_size = _BATCH.value
  config.compute_dtype = _DTYPE.value
  return config


def problem() -> peers.Problem:
  """Returns random pixels and captions of full length."""
  config = run("none")
  model = Run.from_config(config).model
  generator = np.random.default_rng(0)
  images = generator.integers(0, 256, (_BATCH.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3), np.uint8)
  tokens = generator.integers(1, model.text.vocab_size, (_BATCH.value, _TEXT_LENGTH.value), np.int32)
  return peers.Problem(model, config.optimizer, images, tokens)


def ours(remat: str, unroll: int, problem: peers.Problem) -> peers.Contestant:
  """The library's train step on a batch that is already on the device."""
  config = run(remat, unroll)
  resolved = Run.from_config(config)
  mesh = resolved.make_mesh()
  spec, train_step = resolved.build(mesh)
  pairs = len(problem.tokens)
  text = TextBatch(problem.tokens, np.ones(problem.tokens.shape, bool))
  image = patchify(problem.images, config.model.image.patch_size)
  keys = np.arange(4 * pairs, dtype=np.uint32).reshape(pairs, 2, 2)
  batch = jax.device_put(Batch(image, text, keys), batch_sharding(mesh))
  state = [spec.create(config.seed)]

  def step():
    state[0], metrics = train_step(state[0], batch)
    return metrics["loss"]

  return peers.Contestant(f"ours, unroll {unroll}, remat {remat}", step, peers.count(state[0].params))


def matmul(size: int) -> Callable[[], Any]:
  """Returns a product of two square matrices in the compute dtype."""
  left, right = jax.random.normal(jax.random.key(0), (2, size, size), _DTYPE.value)
  product = jax.jit(jnp.matmul)
  return lambda: product(left, right)


def report_compiled(topology: Topology) -> None:
  """Compiles each for a topology and prints what the compiler expects of it."""
  config = run("none")
  model = Run.from_config(config).model
  work = 3 * flops.forward_flops_per_pair(model) * _BATCH.value
  print(f"{_PRESET.value}, {_BATCH.value} pairs on {topology.name}, {_DTYPE.value}: {work / 1e12:.1f} TFLOP a step")
  programs = {
    f"ours, unroll {unroll}, remat {remat}": functools.partial(compile_ours, topology, remat, int(unroll))
    for unroll in _UNROLL.value
    for remat in _REMAT.value
  }
  for name, blocks in _BLOCKS.items() if _BIG_VISION.value else ():
    programs[f"big_vision, {name}"] = functools.partial(
      peers.compile_big_vision, _BIG_VISION.value, model, config.optimizer, topology, _BATCH.value, blocks
    )
  for name, make in programs.items():
    began = time.perf_counter()
    text, memory = make()
    taken = time.perf_counter() - began
    held = f"temporaries {memory['temporaries'] / GIB:5.1f} GiB, compiled in {taken:.0f} s"
    if not text:
      print(f"{name:40} does not fit: {held}", flush=True)
      continue
    found = costs.analyse(hlo.parse(text))
    seconds = kernels.computing_seconds(found, topology.chip)
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in kernels.shares(found, topology.chip).items())
    bound = work / (topology.device_count * topology.chip.flops * seconds)
    print(
      f"{name:40} {1e3 * seconds:7.1f} ms ({found.cycles:,.0f} cycles), MFU <= {bound:.1%}; {shares}; {held}",
      flush=True,
    )


def compile_ours(topology: Topology, remat: str, unroll: int) -> tuple[str, dict[str, float]]:
  """Compiles our step; returns the optimised HLO and the bytes on each device."""
  compiled = compile_step(Run.from_config(run(remat, unroll)), topology)
  return compiled.text, compiled.memory


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # big_vision tells every parameter.
  if _TOPOLOGY.value:
    report_compiled(topologies.find(_TOPOLOGY.value))
    return
  task = problem()
  contestants = [ours(remat, int(unroll), task) for unroll in _UNROLL.value for remat in _REMAT.value]
  if _BIG_VISION.value:
    contestants.append(peers.big_vision(_BIG_VISION.value, task))
  if _TORCH.value:
    contestants.append(peers.torch_eager(task))
  device = jax.devices()[0]
  print(f"JAX {jax.__version__} on {jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores")
  print(f"{_PRESET.value}, images {_IMAGE_SIZE.value}, text {_TEXT_LENGTH.value} tokens x {_TEXT_DEPTH.value} blocks,")
  print(f"batch {_BATCH.value}, {_DTYPE.value}, AdamW")
  for contestant in contestants:
    for note in contestant.notes:
      print(f"{contestant.name}: {note}")

  *times, products = taking_turns([each.step for each in contestants] + [matmul(_MATMUL.value)], _REPEATS.value)
  peak = 2 * _MATMUL.value**3 / products[:, 0].min()
  work = 3 * flops.forward_flops_per_pair(task.model) * _BATCH.value
  print(f"model: {work / 1e9:.0f} GFLOP a step; peak: {peak / 1e9:.0f} GFLOP/s")
  first = np.median(times[0], axis=0)
  for contestant, taken in zip(contestants, times, strict=True):
    wall, processor = np.median(taken, axis=0)
    print(
      f"{contestant.name:29} {contestant.parameters:,} parameters {1e3 * wall:8.1f} ms"
      f" (best {1e3 * taken[:, 0].min():.1f}, processor {1e3 * processor:.1f}) {_BATCH.value / wall:8.1f} images/s"
      f" {work / wall / peak:6.1%} of peak; time over the first's: {wall / first[0]:.2f}x,"
      f" processor {processor / first[1]:.2f}x",
      flush=True,
    )


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  app.run(main)
