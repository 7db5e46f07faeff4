"""Resolution of the images of a stage: one square, each its own size, or one sequence length for each batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from contrastive_jax.errors import UserError, require_known

MODES = ("fixed", "native", "naflex")


@dataclasses.dataclass(frozen=True)
class Resolution:
  """The sizes that images and clips are brought to.

  Attributes:
    mode: "fixed" makes every image a square of `size` pixels; "native" keeps its aspect and as much of its size as the
      token limits allow; "naflex" keeps its aspect and fills a sequence length drawn for each batch from `lengths`.
    size: side in pixels, for "fixed".
    min_tokens: fewest patches of an image, for "native"; a smaller image is enlarged.
    max_tokens: most patches of an image, or of a whole clip; 0 leaves clips at fixed resolution unbounded.
    lengths: sequence lengths, for "naflex".
  """

  mode: str = "fixed"
  size: int = 0
  min_tokens: int = 1
  max_tokens: int = 0
  lengths: tuple[int, ...] = ()

  def __post_init__(self):
    require_known("mode", self.mode, MODES)
    if self.mode == "fixed" and self.size < 1:
      raise UserError(f"size={self.size} must be at least 1 pixel at mode='fixed'")
    if self.mode == "native" and not 1 <= self.min_tokens <= self.max_tokens:
      raise UserError(f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens} must be a range from 1 on")
    if self.mode == "naflex" and (not self.lengths or min(self.lengths) < 1):
      raise UserError(f"lengths={self.lengths} must name at least one sequence length at mode='naflex'")

  def limits(self, times: int) -> dict[str, int]:
    """Returns the token limits of `native.fit` for each of the `times` tubelets of a clip; an image has one."""
    return {"min_tokens": max(1, self.min_tokens // times), "max_tokens": self.max_tokens // times}

  @classmethod
  def fixed(cls, size: int) -> "Resolution":
    """Returns the resolution of squares of `size` pixels."""
    return cls("fixed", size)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Resolution":
    """Reads what `dataclasses.asdict` wrote, perhaps through JSON."""
    return cls(**{**fields, "lengths": tuple(fields.get("lengths", ()))})
