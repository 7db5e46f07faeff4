"""Sources of image-text pairs: random access, with the text apart from the image."""

import dataclasses
import hashlib
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from contrastive_jax.preprocess.video import Clip

_SIDED = re.compile(r"\b(left|right|leftwards|rightwards|clockwise|counterclockwise)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
  """The captions of one sample.

  Attributes:
    captions: captions that fit the image; one is chosen each time the sample is drawn.
    group: pairs of equal group show the same thing and are never each other's negatives; the whole run shares one
      number space of 64 bits (see `stable_hash`).
    cumulative: probability that the choice is among the first k captions, for each k; None for equal chances.
    weight: how much the pair counts in objectives that weigh pairs.
    wrong: captions that nearly fit the image and are wrong, for objectives that compare with such.
  """

  captions: tuple[str, ...]
  group: int
  cumulative: tuple[float, ...] | None = None
  weight: float = 1.0
  wrong: tuple[str, ...] = ()

  def choose(self, draw: float) -> str:
    """Returns the caption for a uniform draw in [0, 1)."""
    last = len(self.captions) - 1
    index = int(draw * len(self.captions)) if self.cumulative is None else bisect_right(self.cumulative, draw)
    return self.captions[min(index, last)]

  def choose_others(self, draws: Sequence[float]) -> list[str]:
    """Returns a caption for each uniform draw in [0, 1), none twice before all were chosen.

    Each is drawn by the chances of those that are left; the first is `choose(draws[0])`.
    """
    ends = self.cumulative or [(k + 1) / len(self.captions) for k in range(len(self.captions))]
    shares = np.diff(ends, prepend=0.0)
    left, chosen = list(range(len(self.captions))), [self.choose(draws[0])]
    left.remove(self.captions.index(chosen[0]))
    for draw in draws[1:]:
      left = left or list(range(len(self.captions)))
      summed = np.cumsum(shares[left])
      chosen.append(
        self.captions[left.pop(min(int(np.searchsorted(summed, draw * summed[-1], "right")), len(left) - 1))]
      )
    return chosen


def in_order(weights: Mapping[str, float]) -> dict[str, float]:
  """Returns weights of fields in the one order in which draws meet them, however a config happens to list them.

  Examples:
    >>> in_order({"title": 1.0, "alt": 3.0})
    {'alt': 3.0, 'title': 1.0}
  """
  return dict(sorted(weights.items()))


def weighted(found: Sequence[tuple[float, Sequence[str]]], group: int) -> Text:
  """Returns captions of several fields, of which one field is drawn by its weight, then one of its captions.

  Args:
    found: weight and captions of each field that has some.
    group: the group of the sample.

  Examples:
    >>> weighted([(1.0, ["a title"]), (3.0, ["a text", "another"])], group=0).cumulative
    (0.25, 0.625, 1.0)
  """
  total = sum(weight for weight, _ in found)
  shares = [weight / total / len(captions) for weight, captions in found for _ in captions]
  captions = tuple(caption for _, captions in found for caption in captions)
  return Text(captions, group, tuple(itertools.accumulate(shares)) if len(found) > 1 else None)


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """One sample.

  Attributes:
    image: uint8 `[height, width, 3]`, or `[height, width, 4]` with colour already multiplied by alpha; or a clip.
    text: its captions.
    id: number that identifies the sample within its source, below 2**40.
    flip: whether the mirrored image still fits every caption.
    others: what towers beside those of images and texts read of it, by the name of the tower: trees of arrays.
  """

  image: np.ndarray | Clip
  text: Text
  id: int
  flip: bool = False
  others: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
  """Random access to samples.

  Reading raises `DecodeError` for a record that is bad for good, and OSError when another attempt may help. With
  worker processes the source is pickled.
  """

  name: str

  def __len__(self) -> int:
    """Returns the number of samples."""
    ...

  def __getitem__(self, index: int, /) -> Example:
    """Reads sample `index`."""
    ...

  def text(self, index: int) -> Text:
    """Reads what `self[index].text` would be, without decoding the image."""
    ...


def names_a_side(captions: Iterable[str]) -> bool:
  """Says whether one of the captions would not fit the mirrored image.

  Examples:
    >>> names_a_side(["a dog", "a cat on the left"]), names_a_side(["a dog"])
    (True, False)
  """
  return any(_SIDED.search(caption) for caption in captions)


def stable_hash(*what: object) -> int:
  """Returns 63 bits of BLAKE2b, the same in every process and every release, unlike `hash`.

  Examples:
    >>> stable_hash("clips", "a.mp4") == stable_hash("clips", "a.mp4") != stable_hash("clips", "b.mp4")
    True
  """
  digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") >> 1
