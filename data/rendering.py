"""Renders samples for the image tower: random views, at the sizes that a stage asks for, as patches in rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Int16, UInt8

from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import native, packing
from contrastive_jax.preprocess.dropping import kept
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.preprocess.video import Clip, choose_frames
from contrastive_jax.preprocess.views import gather
from contrastive_jax.schedule.segments import Inputs
from data.augment import Augment
from data.sources import Example


@dataclasses.dataclass(frozen=True)
class Renderer:
  """Renders the images or clips of consecutive pairs.

  Attributes:
    augment: the random views.
    patch_size: side of a patch in pixels.
    tubelet: number of frames of a patch of a clip.
  """

  augment: Augment
  patch_size: int
  tubelet: int = 1

  def __call__(
    self,
    examples: Sequence[Example],
    inputs: Inputs,
    draws: Float[np.ndarray, "pairs draws"],
    length: int,
    dropping: Float[np.ndarray, "pairs patches"] | None = None,
  ) -> tuple[ImageBatch, int]:
    """Renders one view of each example.

    Args:
      examples: images, or clips whose frames `with_frames` has read, as `inputs` says.
      inputs: sizes, frames and rows.
      draws: the uniform draws of each view, as `Augment` takes them.
      length: patches of a row that is not packed before any are dropped, one of `Inputs.row_lengths`.
      dropping: the uniform draws of each image that decide which of its patches are dropped, as `dropping.kept` takes
        them; None where `inputs` drops none.

    Returns:
      The rows, and the number of images that were shrunk to fit into theirs.
    """
    pixels = [example.image for example in examples]
    grids = self._grids(pixels, inputs, length)
    packed = None
    if inputs.rows is not None:
      smallest = inputs.resolution.min_tokens
      rows = {"rows": inputs.rows.count, "length": inputs.rows.length}
      packed = packing.pack_grids(grids, **rows, min_tokens=smallest, drop_patches=inputs.drop_patches)
      grids = packed.grids
    seen = [(int(y) * self.patch_size, int(x) * self.patch_size) for _, y, x in grids]
    fixed = inputs.resolution.mode == "fixed"
    # Of a square the patches leave out what does not fill one, such as 6 of the 384 pixels at patch size 14.
    whole = inputs.resolution.size if fixed else 0
    sizes = [(whole, whole) if size == (whole // self.patch_size * self.patch_size,) * 2 else size for size in seen]
    views = self.augment(pixels, [example.flip for example in examples], sizes, draws)
    views = [view[..., :height, :width, :] for view, (height, width) in zip(views, seen, strict=True)]
    if inputs.frames == 1 and packed is None and fixed and dropping is None:
      return patchify(views, self.patch_size), 0
    tubelet = 1 if inputs.frames == 1 else self.tubelet
    patches = [native.patchify_clip(view if view.ndim == 4 else view[None], self.patch_size, tubelet) for view in views]
    if dropping is not None:
      patches = [_without_dropped(*one, own, inputs) for one, own in zip(patches, dropping, strict=True)]
    if packed is not None:
      image, shrunk = packing.place_images(patches, packed), packed.shrunk
    else:
      length = inputs.kept(length)
      image, shrunk = gather(patches, length, width=patches[0][0].shape[1], padded=not fixed), 0
    if dropping is not None:
      own = grids.astype(np.int16)
      whole = np.repeat(own[:, None], length, axis=1) if packed is None else packed.spread(own)
      image = dataclasses.replace(image, grids=whole)
    return image, shrunk

  def squares(self, examples: Sequence[Example], draws: Float[np.ndarray, "pairs draws"], size: int) -> ImageBatch:
    """Renders the same views as squares of `size` pixels for a frozen teacher, and of a clip its middle frame."""
    pixels = [e.image if e.image.ndim == 3 else e.image[len(e.image) // 2] for e in examples]
    views = self.augment(pixels, [example.flip for example in examples], size, draws)
    seen = size // self.patch_size * self.patch_size
    return patchify(views[:, :seen, :seen], self.patch_size)

  def _grids(self, pixels: Sequence[np.ndarray], inputs: Inputs, length: int) -> Int[np.ndarray, "pairs 3"]:
    """Returns the number of patches of each view along time, height and width."""
    resolution, patch = inputs.resolution, self.patch_size
    times = inputs.times(self.tubelet)
    grids = np.empty((len(pixels), 3), np.int64)
    for k, image in enumerate(pixels):
      height, width = image.shape[-3:-1]
      if resolution.mode == "fixed":
        size = (resolution.size, resolution.size)
      elif resolution.mode == "native":
        size = native.fit(height, width, patch=patch, **resolution.limits(times))
      else:
        size = native.fit_to_length(height, width, patch=patch, length=length // times)
      grids[k] = times, size[0] // patch, size[1] // patch
    return grids


def _without_dropped(
  patches: UInt8[np.ndarray, "patches bytes"],
  coords: Int16[np.ndarray, "patches 3"],
  draws: Float[np.ndarray, "draws"],
  inputs: Inputs,
) -> packing.Patches:
  """Returns the patches and coordinates that an image or a clip keeps."""
  mine = kept(draws[None], len(patches), inputs.drop_patches)[0]
  return patches[mine], coords[mine]


def with_frames(example: Example, inputs: Inputs, draw: float) -> Example:
  """Returns the example with the frames `[frames, height, width, channels]` that `inputs` asks of its clip.

  An example with an image stays as it is.

  Args:
    example: the example, as its source returns it.
    inputs: the sizes and frames that the step shows.
    draw: a uniform number in [0, 1) that decides the choice of frames.

  Raises:
    UserError: if an image is fed as a clip, or a clip as an image.
    DecodeError: if the clip cannot be read.
  """
  image, clips = example.image, inputs.frames > 1
  # To ask of an array whether it has the attributes of a clip takes longer than to read its captions.
  if (not isinstance(image, np.ndarray) and isinstance(image, Clip)) != clips:
    wrong = "an image source is named among video_sources" if clips else "a source of clips is named among sources"
    raise UserError(f"{wrong}: clips go there, and images into sources")
  if not clips:
    return example
  chosen = choose_frames(image.count, image.fps, inputs.frames, inputs.rule, draw, rate=inputs.rate)
  return dataclasses.replace(example, image=image.read(chosen))
