"""Emoji that move, with the motion in the caption, which cannot be told from one frame.

In the middle of a clip a drawing looks the same whatever it is doing: it stands upright and visible, at a place and in
a size that are drawn without regard to the motion. The middle frame alone therefore carries no information on the
motion, and "motion_openmoji_still", which shows nothing else, is the control of "motion_openmoji". (Earlier and later
frames do carry some: what is sliding left begins, on average, further right.)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from contrastive_jax.evaluation.tasks import LabelledSet
from data import emoji_evaluation
from data.emoji import ARTISTS, CaptionMix, EmojiSource, training_sources
from data.mixture import uniforms
from data.sources import Example, Text, stable_hash

# Odd, so that there is a middle frame.
COUNT = 17
FPS = 8.0
# Side of the frames in pixels: drawings come at about 72 and fill half of it.
SIDE = 96

# Each motion and how captions say it; the first way names the class.
MOTIONS: dict[str, tuple[str, ...]] = {
  "slide left": ("sliding left", "moving to the left"),
  "slide right": ("sliding right", "moving to the right"),
  "slide up": ("sliding up", "moving up"),
  "slide down": ("sliding down", "moving down"),
  "spin clockwise": ("spinning clockwise", "turning clockwise"),
  "spin counterclockwise": ("spinning counterclockwise", "turning counterclockwise"),
  "grow": ("growing", "getting bigger"),
  "shrink": ("shrinking", "getting smaller"),
  "blink": ("blinking", "flashing"),
}
NAMES = tuple(MOTIONS)
# Names put before the class: a class is the mean over them, so that what remains is the motion.
PROMPTS_PER_CLASS = 32

# In frame sides, counted from the left and from the top.
_DIRECTIONS = {"slide left": (-1, 0), "slide right": (1, 0), "slide up": (0, -1), "slide down": (0, 1)}
_TURNS = {"spin clockwise": 1, "spin counterclockwise": -1}
_SCALES = {"grow": 1, "shrink": -1}
_DRAWS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Motion:
  """A clip of a drawing in motion, rendered frame by frame when read.

  Attributes:
    drawing: the drawing, a square with colour multiplied by alpha.
    name: name of the motion, one of `MOTIONS`.
    draws: uniform numbers in [0, 1) that decide place, size, speed and rhythm.
  """

  drawing: UInt8[np.ndarray, "side side 4"]
  name: str
  draws: Float[np.ndarray, "draws"]
  count: int = COUNT
  fps: float = FPS
  height: int = SIDE
  width: int = SIDE

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> UInt8[np.ndarray, f"n {SIDE} {SIDE} 4"]:
    """Returns frames with colour multiplied by alpha."""
    distinct, position = np.unique(np.asarray(indices, int), return_inverse=True)
    return np.stack([self._frame(index) for index in distinct.tolist()])[position]

  def _frame(self, index: int) -> np.ndarray:
    # Time runs from -1/2 to 1/2.
    time = index / (self.count - 1) - 0.5
    u = self.draws
    if self.name == "blink" and _hidden(time, rhythm=u[4], phase=u[5]):
      return np.zeros((SIDE, SIDE, 4), np.uint8)
    across, down = _DIRECTIONS.get(self.name, (0, 0))
    path = (0.35 + 0.15 * u[3]) * time
    x = 0.5 + 0.3 * (u[0] - 0.5) + across * path
    y = 0.5 + 0.3 * (u[1] - 0.5) + down * path
    size = (0.4 + 0.15 * u[2]) * (2.0 + 0.6 * u[3]) ** (_SCALES.get(self.name, 0) * time)
    degrees = _TURNS.get(self.name, 0) * (180 + 90 * u[3]) * time
    return _placed(self.drawing, x, y, size, degrees)


def _hidden(time: float, *, rhythm: float, phase: float) -> bool:
  """Says whether a blinking drawing is off: half of each period, and never in the middle of the clip."""
  period = 0.55 + 0.2 * rhythm
  return bool(0.25 < (time / period + 0.4 * (phase - 0.5)) % 1 < 0.75)


def _placed(drawing: np.ndarray, x: float, y: float, size: float, degrees: float) -> np.ndarray:
  """Places a drawing of `size` around (x, y), in frame sides, turned clockwise."""
  side = round(size * SIDE)
  if side < 0.6 * len(drawing):
    # Bilinear sampling would skip pixels.
    drawing = cv2.resize(drawing, (side, side), interpolation=cv2.INTER_AREA)
  scale = size * SIDE / len(drawing)
  # OpenCV counts angles counterclockwise, and coordinates from the centre of the first pixel.
  middle = (len(drawing) - 1) / 2
  warp = cv2.getRotationMatrix2D((middle, middle), -degrees, scale)
  warp[:, 2] += np.array([x, y]) * SIDE - 0.5 - middle
  return cv2.warpAffine(drawing, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


class MotionSource:
  """A source of every drawing in every motion. The same drawing in another motion is a negative."""

  def __init__(self, name: str, drawings: EmojiSource, mix: CaptionMix):
    """Takes drawings; captions are in English, with aliases as `mix` says."""
    self.name = name
    self.drawings = drawings
    self._mixes = [dataclasses.replace(mix, english=1.0, templates=_templates(motion), bare=0.0) for motion in NAMES]

  def __len__(self) -> int:
    return len(self.drawings) * len(NAMES)

  def __getitem__(self, index: int, /) -> Example:
    drawing, motion = divmod(index, len(NAMES))
    clip = Motion(self.drawings[drawing].image, NAMES[motion], _draws(self.name, index))
    # A mirrored clip moves the other way.
    return Example(clip, self.text(index), index, flip=False)

  def text(self, index: int) -> Text:
    drawing, motion = divmod(index, len(NAMES))
    text = self._mixes[motion].text(self.drawings.concepts[drawing])
    return dataclasses.replace(text, group=stable_hash("motion", text.group, NAMES[motion]))


def motion_sources(mix: CaptionMix | None = None) -> dict[str, MotionSource]:
  """Makes the training sources "motion_noto" and "motion_twemoji", of concepts not held out and without skin tones.

  Raises:
    UserError: if a package is missing.
  """
  mix = mix or CaptionMix()
  drawings = training_sources(mix)
  return {f"motion_{artist}": MotionSource(f"motion_{artist}", drawings[artist], mix) for artist in ARTISTS}


class _Clips(Sequence):
  """Drawings in motion, one motion each: the clip, or its middle frame over and over."""

  def __init__(self, name: str, drawings: Sequence[np.ndarray], motions: np.ndarray, still: bool):
    self._name, self._drawings, self._motions, self._still = name, drawings, motions, still

  def __len__(self) -> int:
    return len(self._motions)

  def __getitem__(self, index: int) -> "Motion | _Still":
    drawing = self._drawings[index * len(self._drawings) // len(self._motions)]
    clip = Motion(drawing, NAMES[self._motions[index]], _draws(self._name, index))
    return _Still(clip) if self._still else clip


@dataclasses.dataclass(frozen=True, eq=False)
class _Still:
  """The middle frame of a moving drawing, for as long as that moves."""

  clip: Motion
  count: int = COUNT
  fps: float = FPS
  height: int = SIDE
  width: int = SIDE

  def read(self, indices: Sequence[int] | Int[np.ndarray, " n"], /) -> UInt8[np.ndarray, f"n {SIDE} {SIDE} 4"]:
    """Returns the same frame for each index."""
    return self.clip.read(np.full(len(indices), self.count // 2))


def openmoji(*, still: bool = False) -> LabelledSet:
  """Opens every OpenMoji drawing in one of the motions, which is to be named; `still` shows the middle frame alone."""
  drawings = emoji_evaluation.openmoji_drawings()
  # Concepts come in an order of kinds; each kind gets all motions.
  motions = np.arange(len(drawings)) % len(NAMES)
  return _labelled("motion_openmoji", drawings, motions, still)


def heldout(*, still: bool = False) -> LabelledSet:
  """Opens Noto's and Twemoji's drawings of the concepts that training never shows, in every motion, to tune on."""
  drawings = emoji_evaluation.heldout_drawings()[1]
  return _labelled("motion_heldout", drawings, np.tile(np.arange(len(NAMES)), len(drawings)), still)


def _labelled(name: str, drawings: Sequence[np.ndarray], motions: np.ndarray, still: bool) -> LabelledSet:
  # Names that training shows, so that only the motion is put to the test.
  shown = [concept for concept in emoji_evaluation.plain_concepts() if not concept.held_out]
  prompts = [concept.name for concept in shown[:: len(shown) // PROMPTS_PER_CLASS][:PROMPTS_PER_CLASS]]
  return LabelledSet(
    name=name + "_still" * still,
    images=_Clips(name, drawings, motions, still),
    labels=motions,
    classes=[MOTIONS[motion][0] for motion in NAMES],
    templates=[f"{prompt} {{}}" for prompt in prompts],
  )


# What `evals` and `--tasks` may name.
EVALUATIONS: dict[str, Callable[[], LabelledSet]] = {
  "motion_openmoji": openmoji,
  "motion_openmoji_still": functools.partial(openmoji, still=True),
  "motion_heldout": heldout,
  "motion_heldout_still": functools.partial(heldout, still=True),
}


def _templates(motion: str) -> tuple[str, ...]:
  return tuple(f"{{}} {way}" for way in MOTIONS[motion])


def _draws(name: str, index: int) -> np.ndarray:
  return uniforms(0, name, index, 1, _DRAWS)[0]
