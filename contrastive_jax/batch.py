"""What flows from the data pipeline into the train step."""

import dataclasses
from typing import Any

import jax

# NumPy on the host, `jax.Array` on the device, tracers under `jit`, shapes when compiling ahead of time.
AnyArray = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageBatch:
  """Images or clips as sequences of raw patches.

  Attributes:
    patches: uint8 pixels `[rows, length, patch_dim]`, each patch flattened as (y, x, channel), not normalised.
    coords: int16 `[rows, length, 3]`, the `(t, y, x)` of each patch in its grid.
    segments: int16 `[rows, length]`, 0 is padding and k the k-th image of the row; None at fixed resolution.
    slots: int32 `[pairs, 2]`, the (row, segment) of each pair's image; None when row i holds the image of pair i.
  """

  patches: AnyArray
  coords: AnyArray
  segments: AnyArray | None = None
  slots: AnyArray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
  """Padded captions.

  Attributes:
    tokens: int32 `[pairs, text_length]`.
    mask: bool `[pairs, text_length]`, True on real tokens.
    group: int32 `[pairs]`; pairs of equal group share an image or a caption and are never each other's negatives.
  """

  tokens: AnyArray
  mask: AnyArray
  group: AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One step's pairs.

  Attributes:
    image: the pairs' images.
    text: the pairs' captions.
    ids: int64 `[pairs]` stable sample ids. They stay on the host: on the device an int64 silently becomes an int32.
    state_rows: int32 `[pairs]` rows of per-sample objective state, for the objectives that keep any.
  """

  image: ImageBatch
  text: TextBatch
  ids: AnyArray | None = None
  state_rows: AnyArray | None = None

  def on_device(self) -> "Batch":
    """The part of the batch that travels to the accelerator."""
    return dataclasses.replace(self, ids=None)
