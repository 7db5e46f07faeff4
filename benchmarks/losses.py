"""Time and temporary memory of the losses next to the dense matrix.

  python -m benchmarks.losses                              # one device
  python -m benchmarks.losses --devices=8 --sizes=8192     # dense under the automatic partitioner
  python -m benchmarks.losses --local=512 --devices=64     # fixed local batch: memory of `ring` must not grow
  python -m benchmarks.losses --dense_limit=0 --groups=label,keys,none --repeats=21    # the price of comparing keys

Times are medians of forward + backward runs that take turns, and ratios are medians of what each turn gives, relative
to the first row; only ratios of one invocation mean anything. Temporaries are XLA's own figure for one device, without
arguments and results.
"""

import functools
import itertools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import groups
from benchmarks.timing import taking_turns
from contrastive_jax import losses

_SIZES = flags.DEFINE_list("sizes", ["1024", "2048", "4096", "16384"], "Global numbers of pairs.")
_DIM = flags.DEFINE_integer("dim", 512, "Dimension of the embeddings.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Emulated CPU devices.")
_LOCAL = flags.DEFINE_integer("local", 0, "Pairs a device, on 2, 4, ... --devices; replaces --sizes.")
_TILES = flags.DEFINE_list("tiles", ["auto"], "Tile sizes to try, `auto` lets the library choose.")
_GROUPS = flags.DEFINE_list("groups", ["none"], f"What says which pairs are no negatives: {', '.join(groups.FORMS)}.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each; 0 compiles only.")
_DENSE_LIMIT = flags.DEFINE_integer("dense_limit", 16384, "Largest number of pairs for which the dense matrix is run.")
_TORCH = flags.DEFINE_bool("torch", False, "Also time the dense losses in PyTorch.")
_AXIS = "data"


def dense_softmax(image, text, scale, bias):
  """Computes the log-sum-exp of the full logits both ways."""
  logits = image @ text.T * scale + bias
  both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
  return jnp.mean(both) / 2 - jnp.mean(jnp.diagonal(logits))


def dense_sigmoid(image, text, scale, bias):
  """Computes the log-sigmoid of the signed full logits."""
  logits = image @ text.T * scale + bias
  signs = 2 * jnp.eye(len(image), dtype=logits.dtype) - 1
  return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(image)


DENSE = {"softmax": dense_softmax, "sigmoid": dense_sigmoid}


def of_library(name: str, mesh: jax.sharding.Mesh, strategy: str, tile: int | None) -> Callable:
  """Returns the library's loss on global arrays: embeddings, scale, bias, and perhaps a group."""

  def local(image, text, scale, bias, group=None):
    options = {"logit_scale": scale, "logit_bias": bias, "axis_name": _AXIS, "strategy": strategy, "tile": tile}
    return losses.OBJECTIVES[name](image, text, group=group, **options)[0]

  def loss(*arguments):
    pairs, everywhere = PartitionSpec(_AXIS), PartitionSpec()
    specs = (pairs, pairs, everywhere, everywhere, pairs)[: len(arguments)]
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere)(*arguments)

  return loss


def compiled(loss: Callable, arguments: tuple) -> Callable:
  """Forward and backward, with the gradients left where the embeddings lie."""
  shardings = tuple(argument.sharding for argument in arguments[:4])
  function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), out_shardings=(shardings[2], shardings))
  return function.lower(*arguments).compile()


def problem(pairs: int, mesh: jax.sharding.Mesh) -> tuple:
  """Returns random unit embeddings on the mesh, scale 10 and bias -10."""
  generator = np.random.default_rng(0)
  embeddings = generator.standard_normal((2, pairs, _DIM.value), np.float32)
  embeddings /= np.linalg.norm(embeddings, axis=2, keepdims=True)
  rows, everywhere = NamedSharding(mesh, PartitionSpec(_AXIS)), NamedSharding(mesh, PartitionSpec())
  scalars = (jax.device_put(jnp.float32(value), everywhere) for value in (10.0, -10.0))
  return *(jax.device_put(side, rows) for side in embeddings), *scalars


def torch_losses(arguments: tuple) -> dict[str, Callable]:
  """Returns the dense losses in PyTorch, as open_clip computes them on one device."""
  import torch

  image, text = (torch.from_numpy(np.array(side)).requires_grad_() for side in arguments[:2])
  scale, bias = (torch.tensor(float(value), requires_grad=True) for value in arguments[2:])
  labels = torch.arange(len(image))

  def backward(loss):
    image.grad = text.grad = scale.grad = bias.grad = None
    loss.backward()
    return image.grad

  def softmax():
    logits = scale * image @ text.T
    cross_entropy = torch.nn.functional.cross_entropy
    return backward((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)

  def sigmoid():
    logits = scale * image @ text.T + bias
    return backward(-torch.nn.functional.logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image))

  return {"softmax": softmax, "sigmoid": sigmoid}


def compare(name: str, pairs: int, devices: int) -> None:
  """Prints one block of rows."""
  mesh = jax.make_mesh((devices,), (_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  arguments = problem(pairs, mesh)
  rows = arguments[0].sharding
  candidates = {"dense": (DENSE[name], arguments)} if pairs <= _DENSE_LIMIT.value else {}
  strategies = ("gather", "ring") if devices > 1 else ("gather",)
  for tile, strategy, form in itertools.product(_TILES.value, strategies, _GROUPS.value):
    label = f"{strategy if devices > 1 else 'engine'} tile={tile} groups={form}"
    loss = of_library(name, mesh, strategy, None if tile == "auto" else int(tile))
    candidates[label] = loss, (*arguments, *groups.random(form, pairs, rows))
  programs = {label: compiled(*candidate) for label, candidate in candidates.items()}
  runs = {label: functools.partial(program, *candidates[label][1]) for label, program in programs.items()}
  if _TORCH.value and devices == 1:
    runs["torch"] = torch_losses(arguments)[name]
  times = taking_turns(list(runs.values()), _REPEATS.value)[..., 0] if _REPEATS.value else None
  for place, label in enumerate(runs):
    memory = "" if label not in programs else f"{programs[label].memory_analysis().temp_size_in_bytes / 2**20:9.2f} MiB"
    speed = ""
    if times is not None:
      speed = f"{1e3 * np.median(times[place]):9.1f} ms {np.median(times[place] / times[0]):7.3f}x"
    print(f"{name:8} pairs={pairs:<6} devices={devices:<3} {label:30} {speed} {memory}", flush=True)


def main(_) -> None:
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  if _LOCAL.value:
    sizes = [(_LOCAL.value * 2**k, 2**k) for k in range(1, _DEVICES.value.bit_length())]
  else:
    sizes = [(int(size), _DEVICES.value) for size in _SIZES.value]
  for name in DENSE:
    for pairs, devices in sizes:
      compare(name, pairs, devices)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  app.run(main)
