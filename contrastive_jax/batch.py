"""The batch that flows from the data pipeline into the train step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

# NumPy on the host, `jax.Array` on the device, tracers under `jit`, shapes when compiling ahead of time.
AnyArray = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageBatch:
  """Images or clips as sequences of raw patches.

  Attributes:
    patches: uint8 pixels `[rows, length, patch_dim]`, each patch flattened as (frame, y, x, channel), not normalised. A
      patch of an image has one frame, a patch of a clip has `image.tubelet` frames.
    coords: int16 `[rows, length, 3]`, the `(t, y, x)` of each patch in its grid.
    segment_ids: int16 `[rows, length]`, 0 is padding and k the k-th image of the row; None at fixed resolution.
    locations: int32 `[pairs, 2]`, the (row, segment id) of each pair's image; None when row i holds the image of pair
      i, with padding where there are segment ids.
    grids: int16 `[rows, length, 3]`, the size along (t, y, x) of the grid that each patch is of, where some of its
      patches were dropped; None when all are there, so that their coordinates say it.
  """

  patches: AnyArray
  coords: AnyArray
  segment_ids: AnyArray | None = None
  locations: AnyArray | None = None
  grids: AnyArray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
  """Captions, one a padded row or packed several a row.

  Attributes:
    tokens: int32 `[rows, length]`.
    mask: bool `[pairs, length]`, True on real tokens; None when packed.
    segment_ids: int16 `[rows, length]`, 0 is padding and k the k-th caption of the row; None when a row is a caption.
    locations: int32 `[pairs, 2]`, the (row, segment) of each pair's caption; None when a row is a caption.
  """

  tokens: AnyArray
  mask: AnyArray
  segment_ids: AnyArray | None = None
  locations: AnyArray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HardCaptions:
  """Captions that nearly fit the image of each pair and are wrong, several a pair.

  Attributes:
    tokens: int32 `[pairs, captions, length]`. Where there are too few, something else stands in their place.
    mask: bool `[pairs, captions, length]`, True on real tokens.
    there: bool `[pairs, captions]`, True on captions that count.
  """

  tokens: AnyArray
  mask: AnyArray
  there: AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StrongViews:
  """Further views of each pair, changed more than those that the model learns to embed; several a pair.

  Attributes:
    patches: uint8 `[rows, views, length, patch_dim]`. Each view has the size of the pair's image, and its patches lie
      where those of `Batch.image` do. None where no term reads images.
    tokens: int32 `[pairs, views, length]`, the changed captions, one a padded row; None where no term reads captions.
    mask: bool `[pairs, views, length]`, True on real tokens.
    keys: uint32 `[pairs, views, 2]`, the 64-bit key of each changed caption.
    places: float32 `[pairs, views, 2, 3]`, the affine maps from the (x, y) of a pixel in a view to those in its image;
      None without views of images, or where these are no squares.
  """

  patches: AnyArray | None = None
  tokens: AnyArray | None = None
  mask: AnyArray | None = None
  keys: AnyArray | None = None
  places: AnyArray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
  """The embeddings that a frozen teacher makes of the pairs.

  Attributes:
    image: L2-normalised float32 `[pairs, teacher_dim]`.
    text: L2-normalised float32 `[pairs, teacher_dim]`, or None where no term needs it.
  """

  image: AnyArray
  text: AnyArray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherInputs:
  """The pairs as a frozen teacher reads them: at its resolution, by its tokenizer.

  Attributes:
    image: the same views as the student's.
    text: the same captions as the student's, or None where no term needs them.
  """

  image: ImageBatch
  text: TextBatch | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One step's pairs.

  Attributes:
    image: the pairs' images.
    text: the pairs' captions.
    keys: uint32 `[pairs, 2, 2]`, the 64-bit keys of each pair's group and of its caption, low words first. Pairs that
      share either are never each other's negatives.
    ids: int64 `[pairs]` stable sample ids. They stay on the host: on the device an int64 silently becomes an int32.
    state_rows: int32 `[pairs]` rows of per-sample objective state, for the objectives that keep any.
    weights: float32 `[pairs]`, how much each pair counts, for the objectives that weigh pairs.
    replayed: float32 `[pairs]`, 1 for the pairs of sources that an earlier run has learned from and 0 for others, for
      the objectives that keep what was learned.
    hard_captions: wrong captions of each pair, for the objectives that compare with them.
    strong: further views of each pair, for the objectives that compare with them.
    present_in: bool `[pairs]`, which pairs take part in a term, by the names of the terms that some sources are kept
      from.
    present: those of `present_in` for the term that reads the batch; None are all.
    teacher: inputs of a frozen teacher, when it runs beside the student.
    targets: outputs of a frozen teacher, from its own step or from a cache.
    others: what the towers of `DualEncoderConfig.others` read, by the name of the tower: trees of arrays `[pairs, ...]`
      of the shapes that `OtherConfig.inputs` describes.
  """

  image: ImageBatch
  text: TextBatch
  keys: AnyArray
  ids: AnyArray | None = None
  state_rows: AnyArray | None = None
  weights: AnyArray | None = None
  replayed: AnyArray | None = None
  hard_captions: HardCaptions | None = None
  strong: StrongViews | None = None
  present_in: Mapping[str, AnyArray] = dataclasses.field(default_factory=dict)
  present: AnyArray | None = None
  teacher: TeacherInputs | None = None
  targets: Targets | None = None
  others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def pairs(self) -> int:
    """Number of pairs; rows may hold several."""
    return self.keys.shape[0]

  def on_device(self) -> "Batch":
    """Returns the part of the batch that travels to the accelerator."""
    return dataclasses.replace(self, ids=None)
