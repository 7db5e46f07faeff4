"""Strips: two to five emoji in a row or a column, all named in the caption in their order.

A square view shows them small, or some of them only; at native resolution each keeps its size.
"""

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastive_jax.evaluation.tasks import PairSet
from data import emoji_evaluation
from data.emoji import ARTISTS, Concept, EmojiSource, training_sources
from data.mixture import uniforms
from data.sources import Example, Text, stable_hash

FEWEST, MOST = 2, 5
TRAINING_STRIPS = 30_000
EVALUATION_STRIPS = 1000
# So few that one drawing does not give the caption away: it occurs in about 35 of the strips.
EVALUATION_CONCEPTS = 100
# Side of each drawing in pixels; the gaps are part of it.
CELL = 64
_GAP = 4
_DRAWS = 8


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a strip shows.

  Attributes:
    items: positions of its drawings among all drawings, all different.
    column: from top to bottom instead of from left to right.
  """

  items: tuple[int, ...]
  column: bool


def layout(name: str, index: int, drawings: int) -> Layout:
  """Returns the strip `index` of a set, as a function of the set's name alone.

  Args:
    name: name of the set.
    index: number of the strip.
    drawings: number of drawings to choose from.
  """
  u = uniforms(0, name, index, 1, _DRAWS)[0]
  items: list[int] = []
  for place in range(FEWEST + int(u[0] * (MOST - FEWEST + 1))):
    # One of the drawings not taken yet: what is taken is skipped in ascending order.
    item = int(u[2 + place] * (drawings - place))
    for taken in sorted(items):
      item += item >= taken
    items.append(item)
  return Layout(tuple(items), bool(u[1] < 0.5))


def caption(names: Sequence[str]) -> str:
  """Joins all names in order.

  Examples:
    >>> caption(["cat", "dog", "cow"])
    'cat, dog and cow'
  """
  return f"{', '.join(names[:-1])} and {names[-1]}"


def render(drawings: Sequence[UInt8[np.ndarray, "_ _ 4"]], column: bool) -> UInt8[np.ndarray, "height width 4"]:
  """Puts drawings side by side, or below each other, in cells of equal size; colour is multiplied by alpha."""
  cells = []
  for drawing in drawings:
    inside = CELL - _GAP
    how = cv2.INTER_AREA if len(drawing) > inside else cv2.INTER_LINEAR
    cells.append(np.pad(cv2.resize(drawing, (inside, inside), interpolation=how), (*((_GAP // 2,) * 2,) * 2, (0, 0))))
  return np.concatenate(cells, axis=0 if column else 1)


class StripSource:
  """Strips of the drawings of a source."""

  def __init__(self, name: str, drawings: EmojiSource, length: int = TRAINING_STRIPS):
    """Takes drawings; `length` strips are made of them when they are read."""
    self.name = name
    self.drawings = drawings
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int, /) -> Example:
    strip = self._layout(index)
    pixels = render([self.drawings[item].image for item in strip.items], strip.column)
    # A mirrored row is in another order.
    return Example(pixels, self.text(index), index, flip=False)

  def text(self, index: int) -> Text:
    shown = [self.drawings.concepts[item] for item in self._layout(index).items]
    return Text((caption([concept.name for concept in shown]),), _group(shown))

  def _layout(self, index: int) -> Layout:
    return layout(self.name, index, len(self.drawings))


def strip_sources() -> dict[str, StripSource]:
  """Makes the training sources "strips_noto" and "strips_twemoji", of concepts not held out and without skin tones.

  Raises:
    UserError: if a package is missing.
  """
  drawings = training_sources()
  return {f"strips_{artist}": StripSource(f"strips_{artist}", drawings[artist]) for artist in ARTISTS}


class _Strips(Sequence):
  """Strips, rendered when asked for, with alpha beside their colour instead of in it, as in files."""

  def __init__(self, layouts: Sequence[Layout], drawings: Sequence[np.ndarray]):
    self._layouts, self._drawings = layouts, drawings

  def __len__(self) -> int:
    return len(self._layouts)

  def __getitem__(self, index: int) -> np.ndarray:
    strip = self._layouts[index]
    pixels = render([self._drawings[item] for item in strip.items], strip.column)
    colour, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:]
    pixels[..., :3] = np.minimum(np.round(255 * colour / np.maximum(alpha, 1)), 255)
    return pixels


def openmoji() -> PairSet:
  """Opens strips of OpenMoji drawings, of concepts that training shows by other artists."""
  concepts = emoji_evaluation.plain_concepts()
  seen = [k for k, concept in enumerate(concepts) if not concept.held_out]
  chosen = seen[:: len(seen) // EVALUATION_CONCEPTS][:EVALUATION_CONCEPTS]
  return _paired("strips_openmoji", [concepts[k] for k in chosen], chosen, emoji_evaluation.openmoji_drawings())


def heldout() -> PairSet:
  """Opens strips of the concepts that training never shows, by Noto or Twemoji, to tune on."""
  concepts, drawings = emoji_evaluation.heldout_drawings()
  return _paired("strips_heldout", concepts, range(len(concepts)), drawings)


def _paired(name: str, concepts: Sequence[Concept], chosen: Sequence[int], drawings: Sequence[np.ndarray]) -> PairSet:
  """Makes strips of `drawings[chosen[k]]`, which show `concepts[k]`, each with a caption of its own."""
  layouts: dict[str, Layout] = {}
  index = 0
  while len(layouts) < EVALUATION_STRIPS:
    strip = layout(name, index, len(chosen))
    names = [concepts[item].name for item in strip.items]
    # Two artists draw the same concept.
    if len(set(names)) == len(names):
      layouts.setdefault(caption(names), Layout(tuple(chosen[item] for item in strip.items), strip.column))
    index += 1
  numbers = np.arange(len(layouts))
  return PairSet(name, _Strips(list(layouts.values()), drawings), list(layouts), numbers, numbers)


# What `evals` and `--tasks` may name.
EVALUATIONS: dict[str, Callable[[], PairSet]] = {"strips_openmoji": openmoji, "strips_heldout": heldout}


def _group(shown: Sequence[Concept]) -> int:
  return stable_hash("strip", *(concept.group for concept in shown))
