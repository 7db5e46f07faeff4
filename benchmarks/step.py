"""Time of the whole train step - towers, loss, gradients, optimiser - next to big_vision's and to one in eager PyTorch.

  python -m benchmarks.step                       # ViT-S/16 at 64 pixels, text 384 x 6 of 16 tokens, batch 64
  python -m benchmarks.step --big_vision=DIR      # a checkout of github.com/google-research/big_vision, same towers
  python -m benchmarks.step --torch               # the same towers in eager PyTorch, where torch can be imported
  python -m benchmarks.step --remat=none,dots,full

The contestants take turns, one step each, on one batch that lies on the device; figures are medians. Only ratios of one
invocation mean anything. Where other programs share the processors, the processor time is the steadier figure (on an
accelerator it means nothing). Model FLOPs are those of the matrix products, three times the forward pass, also where
more is computed; the peak is the best large matrix product of the same invocation.
"""

import os
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
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.training.run import Run

_BATCH = flags.DEFINE_integer("batch", 64, "Pairs a step.")
_PRESET = flags.DEFINE_string("preset", "siglip_s16", "Towers; big_vision runs beside SigLIP's only.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Side of an image in pixels.")
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 16, "Tokens of a caption.")
_TEXT_DEPTH = flags.DEFINE_integer("text_depth", 6, "Blocks of the text tower.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_REMAT = flags.DEFINE_list("remat", ["dots"], "What ours recomputes: none, dots, full.")
_BIG_VISION = flags.DEFINE_string("big_vision", "", "A checkout of big_vision to run beside ours.")
_TORCH = flags.DEFINE_bool("torch", False, "Run the same towers in eager PyTorch beside ours.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps of each.")
_MATMUL = flags.DEFINE_integer("matmul", 2048, "Side of the square matrices whose product gives the peak.")


def run(remat: str) -> ConfigDict:
  """Returns the config of our run."""
  config = common.get_config()
  config.data.sources = ConfigDict({"random": 1.0})  # What is drawn here; nothing reads it.
  config.model = common.model(_PRESET.value)
  config.model.image.image_size = _IMAGE_SIZE.value
  config.model.text.length = _TEXT_LENGTH.value
  config.model.text.transformer.depth = _TEXT_DEPTH.value
  for tower in (config.model.image, config.model.text):
    tower.transformer.remat = remat
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


def ours(remat: str, problem: peers.Problem) -> peers.Contestant:
  """The library's train step on a batch that is already on the device."""
  config = run(remat)
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

  return peers.Contestant(f"ours, remat {remat}", step, peers.count(state[0].params))


def matmul(size: int) -> Callable[[], Any]:
  """Returns a product of two square matrices in the compute dtype."""
  left, right = jax.random.normal(jax.random.key(0), (2, size, size), _DTYPE.value)
  product = jax.jit(jnp.matmul)
  return lambda: product(left, right)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # big_vision tells every parameter.
  task = problem()
  contestants = [ours(remat, task) for remat in _REMAT.value]
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
      f"{contestant.name:17} {contestant.parameters:,} parameters {1e3 * wall:8.1f} ms"
      f" (best {1e3 * taken[:, 0].min():.1f}, processor {1e3 * processor:.1f}) {_BATCH.value / wall:8.1f} images/s"
      f" {work / wall / peak:6.1%} of peak; time over the first's: {wall / first[0]:.2f}x,"
      f" processor {processor / first[1]:.2f}x",
      flush=True,
    )


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  app.run(main)
