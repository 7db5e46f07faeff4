"""A trained dual encoder in use: it embeds images and texts, and classifies pictures by the names of classes."""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from contrastive_jax import inputs
from contrastive_jax import progress as progress_bar
from contrastive_jax.errors import NonFiniteError, UserError, require_known
from contrastive_jax.evaluation.tasks import Images
from contrastive_jax.evaluation.zero_shot import classifier
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import (
  MeshSpec,
  batch_sharding,
  batch_shards,
  host_share,
  parameter_shardings,
  put_batch,
  replicated,
)
from contrastive_jax.preprocess.images import DecodeError
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.video import Clip
from contrastive_jax.preprocess.views import Patches, Views, gather

# Batches dispatched and not yet read back: one is computed while the next is decoded.
IN_FLIGHT = 2
# Batches read together where images differ in length, to put those of similar length into one batch.
SORTED_TOGETHER = 2
DECODING_THREADS = min(16, os.cpu_count() or 1)

# Decoded pixels, a file, or an open picture; a clip, or its frames.
AnyImage = UInt8[np.ndarray, "_ _ _"] | Image.Image | str | os.PathLike | Clip | UInt8[np.ndarray, "_ _ _ _"]
AnyImages = Iterable[AnyImage] | Images
# The rows of the answer that a batch holds, and this host's share of the batch.
Batches = Iterator[tuple[np.ndarray, Any]]


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
    resolution: Resolution | None = None,
    clips: Resolution | None = None,
    frames: int = 8,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    progress: bool = False,
    step: int | None = None,
  ):
    """Puts the parameters on the mesh; nothing is compiled before the first batch of either tower.

    At fixed resolution each tower is compiled once, else the image tower once for each of `lengths` that occurs.

    Args:
      config: the sizes of the two towers.
      params: nested dict of arrays, on the host or already on the mesh, where they stay as they are.
      tokenizer: a function of texts and a length that returns token ids and a mask, `[texts, length]`.
      resolution: the resolution of images; None is fixed at the image size of the image tower.
      clips: the resolution of clips; None is that of images.
      frames: number of frames of a clip that are looked at, from all over its length.
      mesh: the mesh; images and texts are split over its "data" and "fsdp" axes. None is all devices.
      batch_size: number of images or texts encoded at once over the whole mesh, rounded up to a multiple of its data
        shards. Fewer are padded to it: choose it near the number that a call usually brings.
      progress: whether a bar with rate and remaining time is shown on the terminal.
      step: step of the checkpoint that the parameters come from, where they come from one.
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
    self.views = _views(config, resolution, clips, frames)
    graphdef, _ = dual_encoder.abstract(config)
    # Every process reads the whole answer, so the embeddings end up everywhere; they are small.
    shardings = {"in_shardings": (None, batch_sharding(self.mesh)), "out_shardings": replicated(self.mesh)}

    def image_tower(projected: bool) -> Callable[[Any, Any], jax.Array]:
      return jax.jit(
        lambda params, image: dual_encoder.merge(graphdef, params).encode_image(image, projected=projected), **shardings
      )

    self._image_towers = {projected: image_tower(projected) for projected in (True, False)}
    self._other_towers = {
      other.name: jax.jit(
        lambda params, rows, name=other.name: getattr(dual_encoder.merge(graphdef, params), name)(rows).embedding,
        **shardings,
      )
      for other in config.others
    }
    self._text_tower = jax.jit(
      lambda params, text: dual_encoder.merge(graphdef, params).encode_text(*text), **shardings
    )

  def with_params(self, params: Mapping[str, Any]) -> "Model":
    """Returns the same model with other parameters, such as those of a run in training; nothing is compiled again.

    Args:
      params: nested dict of arrays; those that lie on the mesh are used where they are.
    """
    other = copy.copy(self)
    other.params = _on_mesh(self.mesh, self.config, params)
    other.step = None
    return other

  def with_resolution(self, resolution: Resolution, clips: Resolution | None = None, frames: int = 8) -> "Model":
    """Returns the same model at another resolution, such as that of a run's next stage.

    It takes `resolution`, `clips` and `frames` of the constructor.
    """
    other = copy.copy(self)
    other.views = _views(self.config, resolution, clips, frames)
    return other

  @property
  def lengths(self) -> tuple[int, ...]:
    """The row lengths in which images and clips are embedded, in patches."""
    return self.views.lengths()

  @property
  def logit_scale(self) -> float:
    """The multiplier that makes logits of cosine similarities."""
    return float(np.exp(np.asarray(self.params["log_logit_scale"])))

  @property
  def logit_bias(self) -> float | None:
    """The number that sigmoid models add to the logits; None where there is none."""
    bias = self.params.get("logit_bias")
    return None if bias is None else float(np.asarray(bias))

  def encode_image(self, images: AnyImages, *, projected: bool = True) -> Float[np.ndarray, "images dim"]:
    """Embeds images and clips.

    Args:
      images: PIL images, paths, bytes of files or uint8 arrays `[height, width, 3 or 4]`, and clips or arrays
        `[frames, height, width, 3 or 4]`; arrays may be of any library that converts them to NumPy on the CPU. They
        come in anything with a length and an index, are read a batch at a time, and are brought to the resolution of
        the model (see `preprocess.views.Views`). A pandas Series is read by position. No image gives no row.
      projected: whether the embeddings lie in the space shared with texts; False gives the tower's own features,
        `image.transformer.width` of them.

    Returns:
      L2-normalised float32 embeddings, one row for each image.

    Raises:
      UserError: if this is one image in place of a list, or an item is no image, such as an array of floats.
      DecodeError: if a picture cannot be decoded; the error names its position and path.
    """
    images = inputs.images(images)

    def view(row: int) -> Patches:
      item = inputs.image(images[row], row)
      try:
        return self.views(item)
      except DecodeError as error:
        raise inputs.decode_error(error, item, row) from error
      except OSError as error:
        raise inputs.read_error(error, row) from error

    with ThreadPoolExecutor(DECODING_THREADS) as threads:

      def read(rows: list[int]) -> list[Patches]:
        return list(threads.map(view, rows))

      dim = self.config.embed_dim if projected else self.config.image.transformer.width
      return self._encode(self._image_towers[projected], self._image_batches(read, len(images)), len(images), dim)

  def _image_batches(self, read: Callable[[list[int]], list[Patches]], count: int) -> Batches:
    """Yields batches of images of similar length."""
    lengths = np.asarray(self.lengths)
    together = 1 if self.views.uniform else SORTED_TOGETHER
    for rows in self._shown(self._rows(count, together), count, "images"):
      mine = _read_once(read, rows[self._host])
      # Every host sorts its share; all know the sizes of all, and so agree on the shape of each batch.
      sizes = self._from_all_hosts(np.array([(patches.shape[1], len(patches)) for patches, _ in mine]))
      order = np.lexsort((sizes[..., 1], sizes[..., 0]), axis=-1)
      for some in np.split(order, order.shape[1] // self._share, axis=1):
        chosen = np.take_along_axis(sizes, some[..., None], axis=1)
        longest, widest = chosen[..., 1].max(), chosen[..., 0].max()
        length = int(lengths[np.searchsorted(lengths, longest)])
        padded = not self.views.uniform or bool(chosen[..., 1].min() < length)
        batch = gather([mine[row] for row in some[self._host]], length, width=int(widest), padded=padded)
        yield np.take_along_axis(rows, some, axis=1).ravel(), batch

  def encode_text(self, texts: Iterable[str]) -> Float[np.ndarray, "texts dim"]:
    """Embeds texts; those longer than the tower reads are truncated.

    Args:
      texts: strings, in a list, tuple, one-dimensional array or pandas Series, which is read by position.

    Returns:
      L2-normalised float32 embeddings, one row for each text.

    Raises:
      UserError: if this is one text in place of a list, or an item is not a string.
    """
    texts = inputs.texts(texts)

    def read(rows: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
      return list(zip(*self.tokenizer([texts[row] for row in rows], self.config.text.length), strict=True))

    batches = (
      (rows.ravel(), tuple(np.stack(part) for part in zip(*_read_once(read, rows[self._host]), strict=True)))
      for rows in self._shown(self._rows(len(texts)), len(texts), "texts")
    )
    return self._encode(self._text_tower, batches, len(texts), self.config.embed_dim)

  def encode_other(self, tower: str, items: Sequence[Any]) -> Float[np.ndarray, "items dim"]:
    """Embeds what a tower beside those of images and texts reads, such as sounds.

    Args:
      tower: the name of the tower.
      items: trees of arrays of the shapes that `OtherConfig.inputs` describes, one an item.

    Returns:
      L2-normalised float32 embeddings, one row for each item.

    Raises:
      UserError: if the model has no such tower, or an item is of another shape or type.
    """
    others = {other.name: other for other in self.config.others}
    require_known("tower", tower, others)
    for place, item in enumerate(items):
      others[tower].check(item, f"item {place}")
    batches = (
      (rows.ravel(), jax.tree.map(lambda *leaves: np.stack(leaves), *(items[row] for row in rows[self._host])))
      for rows in self._shown(self._rows(len(items)), len(items), "items")
    )
    return self._encode(self._other_towers[tower], batches, len(items), self.config.embed_dim)

  def zero_shot(
    self, images: AnyImages, classes: Iterable[str], templates: Iterable[str] = ("{}",)
  ) -> Float[np.ndarray, "images classes"]:
    """Computes the probability of each class for each image, without training on any.

    Args:
      images: the images, as `encode_image` takes them.
      classes: at least two class names, all different.
      templates: prompts in which `{}` stands for the class name, such as "a photo of a {}."; their embeddings are
        averaged.

    Returns:
      A row for each image, which sums to one over the classes.

    Raises:
      UserError: if the classes are fewer than two or not distinct for the model's tokenizer too, or a template has not
        exactly one `{}`.
    """
    classes, templates = inputs.class_names(classes), inputs.templates(templates)
    self._require_told_apart(classes, templates)
    logits = self.logit_scale * self.encode_image(images) @ classifier(self, classes, templates).T
    unnormalised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=1, keepdims=True)

  def _require_told_apart(self, classes: Sequence[str], templates: Sequence[str]) -> None:
    """Raises a `UserError` for two classes of the same tokens, which would share the probability of one."""
    first: dict[bytes, int] = {}
    for index, name in enumerate(classes):
      tokens, mask = self.tokenizer([template.replace("{}", name) for template in templates], self.config.text.length)
      same = first.setdefault(np.where(mask, tokens, -1).tobytes(), index)
      if same != index:
        raise UserError(
          f"classes[{same}] {classes[same]!r} and classes[{index}] {name!r} are the same tokens to the model, which"
          f" reads {self.config.text.length} of them: leave one of them out, or name it otherwise"
        )

  def similarity(self, images: AnyImages, texts: Iterable[str]) -> Float[np.ndarray, "images texts"]:
    """Returns the cosine similarity of each image to each text, from -1 to 1.

    Args:
      images: the images, as `encode_image` takes them.
      texts: the texts, as `encode_text` takes them.
    """
    texts = inputs.texts(texts)
    return self.encode_image(images) @ self.encode_text(texts).T

  def __repr__(self) -> str:
    image, text = self.config.image, self.config.text
    count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    step = "" if self.step is None else f"step={self.step}, "
    return (
      f"Model({step}{count:,} parameters, embed_dim={self.config.embed_dim}, image_size={image.image_size}, "
      f"patch_size={image.patch_size}, text_length={text.length}, devices={self.mesh.size})"
    )

  def _encode(self, tower: Callable[[Any, Any], jax.Array], batches: Batches, count: int, dim: int) -> np.ndarray:
    embeddings = np.empty((count, dim), np.float32)
    pending: deque[tuple[np.ndarray, jax.Array]] = deque()

    def collect() -> None:
      rows, batch = pending.popleft()
      embeddings[rows] = np.asarray(batch)

    for rows, batch in batches:
      pending.append((rows, tower(self.params, put_batch(self.mesh, batch))))
      if len(pending) == IN_FLIGHT:
        collect()
    while pending:
      collect()
    # What overflows becomes NaN in the tower or, divided by an infinite norm, a vector of zeros.
    sound = int((np.abs(np.linalg.norm(embeddings, axis=1) - 1) < 0.1).sum())
    if sound < count:
      raise NonFiniteError(
        f"{count - sound:,} of {count:,} embeddings are no unit vectors, since the model computes zeros or numbers that"
        " are not finite: take an earlier checkpoint, or put back the original weights"
      )
    return embeddings

  @property
  def _host(self) -> int:
    return host_share(self.mesh)[0]

  @property
  def _share(self) -> int:
    return self.batch_size // host_share(self.mesh)[1]

  def _rows(self, count: int, together: int = 1) -> Iterator[np.ndarray]:
    """Yields the rows `[hosts, rows of a host]` of one batch after the other, or of several together.

    The last item stands in where the last batch is not full.
    """
    hosts = host_share(self.mesh)[1]
    step = together * self.batch_size
    for start in range(0, count, step):
      stop = start + min(step, -(-(count - start) // self.batch_size) * self.batch_size)
      yield np.minimum(np.arange(start, stop), count - 1).reshape(hosts, -1)

  def _from_all_hosts(self, values: np.ndarray) -> np.ndarray:
    """Gathers each host's array and returns all of them, `[hosts, ...]`, on every host."""
    hosts = host_share(self.mesh)[1]
    if hosts == 1:
      return values[None]
    everywhere = jax.jit(lambda array: array, out_shardings=replicated(self.mesh))
    return np.asarray(everywhere(put_batch(self.mesh, values))).reshape(hosts, *values.shape)

  def _shown(self, batches: Iterator[np.ndarray], count: int, what: str) -> Iterator[np.ndarray]:
    return progress_bar.shown(batches, count, what) if self.progress else batches


def _views(config: DualEncoderConfig, resolution: Resolution | None, clips: Resolution | None, frames: int) -> Views:
  image = config.image
  resolution = resolution or Resolution.fixed(image.image_size)
  return Views(
    image.patch_size,
    image.tubelet,
    resolution,
    clips or resolution,
    frames,
    resize=image.resize,
    interpolation=image.interpolation,
  )


def _read_once(read: Callable[[list[int]], Sequence], rows: np.ndarray) -> list:
  """Reads the items of the rows, each once; the last may stand in several rows."""
  distinct, position = np.unique(rows, return_inverse=True)
  items = read(distinct.tolist())
  return [items[k] for k in position]


def _on_mesh(mesh: Mesh, config: DualEncoderConfig, params: Mapping[str, Any]) -> Any:
  def put(leaf, target):
    there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if there else jax.device_put(leaf, target.sharding)

  return jax.tree.map(put, dict(params), placed(mesh, config, dict(params)))


def placed(mesh: Mesh, config: DualEncoderConfig, params: Any) -> Any:
  """Returns the shapes of parameters with their places on a mesh.

  Args:
    mesh: the mesh on which they are placed.
    config: the sizes of the two towers.
    params: nested dict of all or some of the parameters, or of their shapes.
  """
  axes = _same_part(dual_encoder.logical_axes(config), params)
  shardings = parameter_shardings(mesh, MeshSpec(), params, axes)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, shardings
  )


def _same_part(whole: Any, part: Any) -> Any:
  if not isinstance(part, Mapping):
    return whole
  return {name: _same_part(whole[name], value) for name, value in part.items()}
