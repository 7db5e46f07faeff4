"""What the batches of a run hold beside images, captions and keys, as its objective asks for it."""

import dataclasses
from collections.abc import Mapping, Sequence

# The number of features of a frozen teacher's images, and of its captions where a term asks for them.
TeacherDims = tuple[int, int | None] | None


@dataclasses.dataclass(frozen=True)
class Extras:
  """What batches bring beside their images, captions and keys; by default nothing.

  Attributes:
    state_rows: whether they name the rows of their samples in the state of the objective.
    weights: whether they weigh their pairs.
    replayed: the sources whose pairs are marked as replayed, all of them where it is empty; None marks none.
    hard_captions: number of wrong captions of each pair.
    strong_images: number of strong views of each image.
    strong_texts: number of changed captions of each pair.
    present_in: the sources whose pairs take part in a term, by the names of the terms that some are kept from.
    teacher_dims: the number of features of the targets of a frozen teacher, of images and of captions, which are None
      where no term asks for them; None without a teacher.
  """

  state_rows: bool = False
  weights: bool = False
  replayed: Sequence[str] | None = None
  hard_captions: int = 0
  strong_images: int = 0
  strong_texts: int = 0
  present_in: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  teacher_dims: TeacherDims = None

  @property
  def images(self) -> int:
    """The number of views of each image that a batch holds, that of the pair itself included."""
    return 1 + self.strong_images

  @property
  def texts(self) -> int:
    """The number of captions of each pair that a batch holds, its own included."""
    return 1 + self.hard_captions + self.strong_texts


NO_EXTRAS = Extras()
