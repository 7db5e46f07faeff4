"""Train steps of others on towers like ours, for `benchmarks/step.py`.

Nothing of theirs is part of this project: the reader points at a checkout or installs a package.
"""

import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from contrastive_jax.errors import UserError
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding, replicated
from contrastive_jax.planning.compiling import compile_for
from contrastive_jax.planning.topologies import Topology

# Imported by big_vision for its input pipeline and checkpoints, never called by a train step.
_NOT_CALLED = ("tensorflow", "tensorflow.io", "tensorflow.io.gfile")


@dataclasses.dataclass
class Contestant:
  """Something that trains.

  Attributes:
    name: what the table calls it.
    step: makes one update of its own state, when called; returns what to wait for.
    parameters: number of trained parameters.
    notes: what had to be done to run it.
  """

  name: str
  step: Callable[[], Any]
  parameters: int
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
  """What all contestants train on.

  Attributes:
    model: the towers, with SigLIP's heads: attention pooling and the last token.
    optimizer: `config.optimizer` of a run, AdamW.
    images: uint8 `[pairs, height, width, channel]`.
    tokens: int32 `[pairs, length]`.
  """

  model: DualEncoderConfig
  optimizer: ConfigDict
  images: np.ndarray
  tokens: np.ndarray


def count(params: Any) -> int:
  """Returns the number of scalars in a tree of arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _import_big_vision(checkout: str) -> tuple[Any, Any, tuple[str, ...]]:
  if not (Path(checkout) / "big_vision/models/vit.py").is_file():
    raise UserError(f"--big_vision={checkout} is not a checkout of github.com/google-research/big_vision")
  # Flax and PyTorch look for TensorFlow themselves, so that the empty modules may stay only while big_vision is read.
  importlib.import_module("flax.training.checkpoints")
  notes, empty = [], []
  for name in _NOT_CALLED:
    try:
      importlib.import_module(name)
    except ImportError:
      sys.modules[name] = types.ModuleType(name)
      parent, _, child = name.rpartition(".")
      if parent:
        setattr(sys.modules[parent], child, sys.modules[name])
      empty.append(name)
      notes.append(f"empty module {name}")
  # Functions that JAX has moved, under their old names.
  for old, new in {"tree_map": jax.tree.map, "tree_leaves": jax.tree.leaves}.items():
    if not hasattr(jax, old):
      setattr(jax, old, new)
      notes.append(f"jax.{old} = jax.tree.{old.removeprefix('tree_')}")
  sys.path.insert(0, os.path.abspath(checkout))
  towers = importlib.import_module("big_vision.models.proj.image_text.two_towers")
  optimizers = importlib.import_module("big_vision.optax")
  for name in empty:
    del sys.modules[name]
  return towers, optimizers, tuple(notes)


def _require_siglip(model: DualEncoderConfig, flag: str, dtypes: tuple[str, ...] = ("float32",)) -> None:
  """Refuses towers that are not those written here, which have SigLIP's heads and compute in some types."""
  if (model.image.pool, model.text.pool) != ("map", "last") or model.image.projection or model.dtype not in dtypes:
    raise UserError(f"{flag} runs beside SigLIP's towers in {' or '.join(dtypes)}: choose them by --preset and --dtype")


@dataclasses.dataclass(frozen=True)
class BigVision:
  """The step of big_vision's SigLIP trainer.

  Attributes:
    init: a function of images and tokens that draws the state, parameters and that of the optimiser.
    update: a function of state, random key, images in [-1, 1] and tokens that returns the next state and metrics.
    notes: what had to be done to run it.
  """

  init: Callable[..., Any]
  update: Callable[..., Any]
  notes: tuple[str, ...]


def big_vision_step(
  checkout: str, towers: DualEncoderConfig, options: ConfigDict, pairs: int, blocks: dict[str, Any] | None = None
) -> BigVision:
  """Makes the step of a big_vision checkout's own towers and optimiser.

  The trainer's step lies inside its `main`; it is expressed here: dense sigmoid loss, update, three norms.

  Args:
    checkout: folder of the checkout.
    towers: the towers, with SigLIP's heads. In bfloat16 its image tower computes, the text tower in float32 always.
    options: `config.optimizer` of a run, AdamW.
    pairs: number of pairs a step.
    blocks: how its towers run their blocks, `scan` and `remat_policy`; left out, depth is unrolled and nothing is
      recomputed.
  """
  two_towers, bv_optax, notes = _import_big_vision(checkout)
  vision, text = towers.image.transformer, towers.text.transformer

  def shape(tower):
    sizes = {"width": tower.width, "depth": tower.depth, "mlp_dim": tower.mlp_dim, "num_heads": tower.heads}
    return {**sizes, **(blocks or {})}

  patch = (towers.image.patch_size,) * 2
  model = two_towers.Model(
    image={**shape(vision), "patch_size": patch, "pool_type": "map", "dtype_mm": towers.dtype},
    text={**shape(text), "vocab_size": towers.text.vocab_size, "pool_type": "last"},
    out_dim=(None, towers.embed_dim),
    temperature_init=float(np.exp(towers.init_logit_scale)),
    bias_init=towers.init_logit_bias,
  )
  config = ConfigDict(
    {
      "optax_name": "scale_by_adam",
      "optax": {"b1": options.b1, "b2": options.b2, "eps": options.eps},
      "lr": options.learning_rate,
      "wd": options.weight_decay,
      "grad_clip_norm": options.clip_norm,
      "schedule": {"decay_type": "cosine", "warmup_steps": 100},
    }
  )
  image = jax.ShapeDtypeStruct((1, towers.image.image_size, towers.image.image_size, 3), jnp.float32)
  caption = jax.ShapeDtypeStruct((1, towers.text.length), jnp.int32)
  abstract = jax.eval_shape(model.init, jax.random.key(0), image, caption)["params"]
  sizes = {"total_steps": 10_000, "batch_size": pairs, "data_size": 1_000_000}
  optimizer, _ = bv_optax.make(config, abstract, sched_kw=sizes)

  def init(images, tokens):
    params = model.init(jax.random.key(0), images[:1], tokens[:1])["params"]
    return params, optimizer.init(params)

  def loss_fn(params, images, tokens, key):
    image, text, extras = model.apply({"params": params}, images, tokens, train=True, rngs={"dropout": key})
    logits = image @ text.T * extras["t"] + extras["b"]
    signs = 2 * jnp.eye(len(image)) - 1
    return jnp.mean(-jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1))

  def update(state, key, images, tokens):
    params, opt_state = state
    key = jax.random.fold_in(key, bv_optax.get_count(opt_state, jittable=True))
    loss, gradients = jax.value_and_grad(loss_fn)(params, images, tokens, jax.random.split(key)[1])
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    norms = {
      name: optax.tree.norm(tree) for name, tree in (("grads", gradients), ("params", params), ("updates", updates))
    }
    return (params, opt_state), {"training_loss": loss, **norms}

  return BigVision(init, update, notes)


def big_vision(checkout: str, problem: Problem) -> Contestant:
  """The towers and the optimiser of a big_vision checkout, with the state donated and its defaults for blocks."""
  _require_siglip(problem.model, "--big_vision")
  theirs = big_vision_step(checkout, problem.model, problem.optimizer, len(problem.tokens))
  # Its input pipeline gives pixels in [-1, 1].
  images, tokens = jax.device_put((problem.images / np.float32(127.5) - 1, problem.tokens))
  update = jax.jit(theirs.update, donate_argnums=0)
  state = [jax.jit(theirs.init)(images, tokens)]
  key = jax.random.key(1)

  def step():
    state[0], metrics = update(state[0], key, images, tokens)
    return metrics

  return Contestant("big_vision", step, count(state[0][0]), theirs.notes)


def compile_big_vision(
  checkout: str,
  towers: DualEncoderConfig,
  options: ConfigDict,
  topology: Topology,
  pairs: int,
  blocks: dict[str, Any],
) -> tuple[str, dict[str, float]]:
  """Compiles its step for a topology, every device with all of the state, as its SigLIP configs have it.

  Returns:
    The optimised HLO and the bytes on each device, as `compiling.compile_for` does.
  """
  _require_siglip(towers, "--big_vision", ("float32", "bfloat16"))
  theirs = big_vision_step(checkout, towers, options, pairs, blocks)
  mesh = MeshSpec().make(topology.devices())

  def placed(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

  size = towers.image.image_size
  images = jax.ShapeDtypeStruct((pairs, size, size, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((pairs, towers.text.length), jnp.int32)
  state, key = jax.eval_shape(theirs.init, images, tokens), jax.eval_shape(lambda: jax.random.key(1))
  update = jax.jit(theirs.update, donate_argnums=0, out_shardings=replicated(mesh))
  state, key = placed((state, key), replicated(mesh))
  return compile_for(topology, update, state, key, *placed((images, tokens), batch_sharding(mesh)))


def torch_eager(problem: Problem) -> Contestant:
  """The same towers and step in eager PyTorch, from its own layers."""
  _require_siglip(problem.model, "--torch")
  try:
    import torch
  except ImportError:
    raise UserError("--torch needs PyTorch beside JAX: pip install torch") from None
  nn, functional = torch.nn, torch.nn.functional
  config, options = problem.model, problem.optimizer

  def mlp(shape):
    return nn.Sequential(
      nn.Linear(shape.width, shape.mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(shape.mlp_dim, shape.width)
    )

  class Block(nn.Module):
    def __init__(self, shape):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
      self.attention = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True)
      self.mlp = mlp(shape)

    def forward(self, x):
      y = self.norm1(x)
      x = x + self.attention(y, y, y, need_weights=False)[0]
      return x + self.mlp(self.norm2(x))

  class Towers(nn.Module):
    def __init__(self):
      super().__init__()
      image, text = config.image.transformer, config.text.transformer
      self.patches = nn.Conv2d(3, image.width, config.image.patch_size, config.image.patch_size)
      self.places = nn.Parameter(torch.randn(config.image.grid**2, image.width) * image.width**-0.5)
      self.image = nn.Sequential(*(Block(image) for _ in range(image.depth)), nn.LayerNorm(image.width))
      self.probe = nn.Parameter(torch.randn(1, 1, image.width))
      self.pool = nn.MultiheadAttention(image.width, image.heads, batch_first=True)
      self.pool_norm, self.pool_mlp = nn.LayerNorm(image.width), mlp(image)
      self.tokens = nn.Embedding(config.text.vocab_size, text.width)
      self.positions = nn.Parameter(torch.randn(config.text.length, text.width) * text.width**-0.5)
      self.text = nn.Sequential(*(Block(text) for _ in range(text.depth)), nn.LayerNorm(text.width))
      self.projection = nn.Linear(text.width, config.embed_dim)
      self.log_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
      self.bias = nn.Parameter(torch.tensor(config.init_logit_bias))

    def forward(self, images, tokens):
      x = self.image(self.patches(images).flatten(2).mT + self.places)
      x = self.pool(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0]
      image = functional.normalize(x + self.pool_mlp(self.pool_norm(x)), dim=-1)
      text = self.text(self.tokens(tokens) + self.positions)[:, -1]
      text = functional.normalize(self.projection(text), dim=-1)
      logits = image @ text.T * self.log_scale.exp() + self.bias
      return -functional.logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image)

  images = torch.from_numpy(problem.images / np.float32(127.5) - 1).permute(0, 3, 1, 2).contiguous()
  tokens = torch.from_numpy(problem.tokens).long()
  model = Towers()
  matrices = [value for value in model.parameters() if value.ndim >= 2]
  vectors = [value for value in model.parameters() if value.ndim < 2]
  optimizer = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
    lr=options.learning_rate,
    betas=(options.b1, options.b2),
    eps=options.eps,
  )

  def step():
    optimizer.zero_grad()
    loss = model(images, tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
    optimizer.step()
    return loss.item()

  parameters = sum(value.numel() for value in model.parameters())
  return Contestant("PyTorch eager", step, parameters, (f"torch {torch.__version__}",))
