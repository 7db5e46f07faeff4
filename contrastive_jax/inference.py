"""A trained dual encoder in use: embed images, embed texts, name what is in a picture."""

import copy
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import Images
from contrastive_jax.evaluation.zero_shot import classifier
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.presets import DualEncoderConfig
from contrastive_jax.parallel.mesh import (
  MeshSpec,
  batch_sharding,
  batch_shards,
  host_share,
  parameter_shardings,
  put_batch,
  replicated,
)
from contrastive_jax.preprocess import images as preprocess
from contrastive_jax.preprocess import tokenizers

# Batches dispatched and not yet read back: one is computed while the next is decoded.
IN_FLIGHT = 2
DECODING_THREADS = min(16, os.cpu_count() or 1)

# Decoded pixels, a file, or an open picture.
AnyImage = UInt8[np.ndarray, "_ _ _"] | Image.Image | str | os.PathLike
AnyImages = Sequence[AnyImage] | Images


class Model:
  """A dual encoder with its tokenizer, on a mesh.

  Every process of a job makes the same calls with the same arguments, embeds its share and gets the whole answer.
  """

  def __init__(
    self,
    config: DualEncoderConfig,
    params: Mapping[str, Any],
    tokenizer: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]],
    *,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    progress: bool = False,
    step: int | None = None,
  ):
    """Puts the parameters on the mesh; nothing is compiled before the first batch of either tower.

    Args:
      config: of the two towers.
      params: nested dict of arrays, on the host or already on the mesh, where they stay as they are.
      tokenizer: texts and a length -> token ids and mask `[texts, length]`.
      mesh: images and texts are split over its "data" and "fsdp" axes; None is all devices.
      batch_size: images or texts encoded at once over the whole mesh, rounded up to a multiple of its data shards.
        Fewer are padded to it, so that each tower is compiled once: choose it near what a call usually brings.
      progress: show a bar with rate and remaining time on the terminal.
      step: of the checkpoint that the parameters come from, where they come from one.
    """
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size}: choose a positive number of images or texts to encode at once")
    self.config = config
    self.tokenizer = tokenizer
    self.mesh = MeshSpec().make() if mesh is None else mesh
    shards = batch_shards(self.mesh)
    self.batch_size = -(-batch_size // shards) * shards
    self.progress = progress
    self.step = step
    self.params = _on_mesh(self.mesh, config, params)
    graphdef, _ = dual_encoder.abstract(config)
    # Every process reads the whole answer, so the embeddings end up everywhere; they are small.
    shardings = {"in_shardings": (None, batch_sharding(self.mesh)), "out_shardings": replicated(self.mesh)}
    self._image_tower = jax.jit(
      lambda params, image: dual_encoder.merge(graphdef, params).encode_image(image), **shardings
    )
    self._text_tower = jax.jit(
      lambda params, text: dual_encoder.merge(graphdef, params).encode_text(*text), **shardings
    )

  def with_params(self, params: Mapping[str, Any]) -> "Model":
    """The same model with other parameters, such as those of a run in training: nothing is compiled again.

    Args:
      params: as in the constructor; arrays that lie on the mesh are used where they are.
    """
    other = copy.copy(self)
    other.params = _on_mesh(self.mesh, self.config, params)
    other.step = None
    return other

  @property
  def logit_scale(self) -> float:
    """Multiplies cosine similarities to give logits."""
    return float(np.exp(np.asarray(self.params["log_logit_scale"])))

  @property
  def logit_bias(self) -> float | None:
    """Added to the logits of sigmoid models; None where there is none."""
    bias = self.params.get("logit_bias")
    return None if bias is None else float(np.asarray(bias))

  def encode_image(self, images: AnyImages) -> Float[np.ndarray, "images dim"]:
    """L2-normalised float32 embeddings.

    Args:
      images: PIL images, uint8 arrays `[height, width, 3 or 4]` or paths, in anything with a length and an index; they
        are read a batch at a time; the shorter side is resized to the tower's and the middle square cut out.
    """
    if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) == 3:
      raise UserError(f"encode_image takes a list of images, got one {type(images).__name__}: write [image]")
    vision = self.config.vision
    # A patch embedding leaves out the pixels that do not fill a patch, such as 6 of the 384 at patch size 14.
    seen = vision.grid * vision.patch_size

    def prepare(index: int) -> np.ndarray:
      return preprocess.center_crop(preprocess.decode(images[index]), vision.image_size)[:seen, :seen]

    with ThreadPoolExecutor(DECODING_THREADS) as threads:

      def read(rows: list[int]) -> ImageBatch:
        return preprocess.patchify(np.stack(list(threads.map(prepare, rows))), vision.patch_size)

      return self._encode(self._image_tower, read, len(images), "images")

  def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
    """L2-normalised float32 embeddings of texts; those longer than the tower reads are truncated."""
    if isinstance(texts, str):
      raise UserError(f"encode_text takes a list of texts, got one: write [{texts!r}]")

    def read(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
      return self.tokenizer([texts[row] for row in rows], self.config.text.length)

    return self._encode(self._text_tower, read, len(texts), "texts")

  def zero_shot(
    self, images: AnyImages, classes: Sequence[str], templates: Sequence[str] = ("{}",)
  ) -> Float[np.ndarray, "images classes"]:
    """Probability of each class for each image, without training on any: rows sum to one.

    Args:
      images: see `encode_image`.
      classes: class names.
      templates: prompts in which `{}` stands for the class name, such as "a photo of a {}."; their embeddings are
        averaged.
    """
    logits = self.logit_scale * self.encode_image(images) @ classifier(self, classes, templates).T
    unnormalised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=1, keepdims=True)

  def _encode(self, tower, read: Callable[[list[int]], Any], count: int, what: str) -> np.ndarray:
    embeddings = np.empty((count, self.config.embed_dim), np.float32)
    pending: deque[tuple[int, jax.Array]] = deque()

    def collect() -> None:
      start, batch = pending.popleft()
      rows = embeddings[start : start + self.batch_size]
      rows[:] = np.asarray(batch)[: len(rows)]

    host, hosts = host_share(self.mesh)
    share = self.batch_size // hosts
    for start in self._shown(range(0, count, self.batch_size), count, what):
      # The last item stands in where the last batch is not full: it is read once and its copies are dropped.
      rows = np.minimum(np.arange(start + host * share, start + (host + 1) * share), count - 1)
      distinct, position = np.unique(rows, return_inverse=True)
      batch = jax.tree.map(lambda array, at=position: array[at], read(distinct.tolist()))
      pending.append((start, tower(self.params, put_batch(self.mesh, batch))))
      if len(pending) == IN_FLIGHT:
        collect()
    while pending:
      collect()
    return embeddings

  def _shown(self, starts: range, count: int, what: str) -> Iterator[int]:
    if not self.progress:
      yield from starts
      return
    columns = (
      TextColumn(f"[bold]encoding {what}"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
      task = bar.add_task(what, total=count, rate="")
      for start in starts:
        yield start
        bar.update(task, completed=min(start + self.batch_size, count))
        speed = bar.tasks[0].speed
        bar.update(task, rate=f"{speed:,.0f} {what}/s" if speed else "")


def load(
  path: str | os.PathLike,
  step: int | None = None,
  *,
  mesh: Mesh | None = None,
  batch_size: int = 256,
  progress: bool = False,
) -> Model:
  """Opens a trained model.

  Args:
    path: a run directory, or weights imported by convert.py.
    step: which checkpoint; None is the newest.
    mesh: see `Model`.
    batch_size: see `Model`.
    progress: see `Model`.

  Raises:
    UserError: if the directory is not a run, has no such checkpoint, or not the tokenizer of its checkpoint.
  """
  # Training calls evaluation and evaluation calls this module: importing training above would close the circle.
  from contrastive_jax.training.checkpoint import restore_params
  from contrastive_jax.training.config import model_config

  path = Path(path)
  if not (path / "config.json").is_file():
    raise UserError(f"{path} is not a run directory: it has no config.json")
  config = model_config(json.loads((path / "config.json").read_text()))
  tokenizer = tokenizers.load(str(path / "tokenizer"))
  mesh = MeshSpec().make() if mesh is None else mesh
  restored = restore_params(path, step, lambda part: _placed(mesh, config, part))
  if restored.about.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
    raise UserError(f"{path / 'tokenizer'} is not the tokenizer that the checkpoint was trained with: put it back")
  return Model(
    config,
    restored.params,
    tokenizer,
    mesh=mesh,
    batch_size=batch_size,
    progress=progress,
    step=restored.step,
  )


def _on_mesh(mesh: Mesh, config: DualEncoderConfig, params: Mapping[str, Any]) -> Any:
  def put(leaf, target):
    there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if there else jax.device_put(leaf, target.sharding)

  return jax.tree.map(put, dict(params), _placed(mesh, config, dict(params)))


def _placed(mesh: Mesh, config: DualEncoderConfig, params: Any) -> Any:
  """Shapes of all or some of the parameters, with where they go on the mesh."""
  axes = _same_part(dual_encoder.logical_axes(config), params)
  shardings = parameter_shardings(mesh, MeshSpec(), params, axes)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, shardings
  )


def _same_part(whole: Any, part: Any) -> Any:
  if not isinstance(part, Mapping):
    return whole
  return {name: _same_part(whole[name], value) for name, value in part.items()}
