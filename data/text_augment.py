"""Changed captions: without stop words, with words exchanged, left out, or punctuation between them."""

import dataclasses
import random
import string

from contrastive_jax.errors import UserError

# English words that say little of a picture. Words of place and of number are not among them.
_LITTLE = """
a an the this that these those it its he him his she her hers they them their theirs we us our ours you your yours i me
my mine who whom whose which what there here is am are was were be been being has have had having do does did doing will
would shall should can could may might must and or but if so as of at by for from to with about into than then too very
just also such same own some any each both few more most other all only it's he's she's
"""
STOP_WORDS = frozenset(_LITTLE.split())
# The marks that "insert" puts between words, as in AEDA.
_MARKS = (".", ";", "?", ":", "!", ",")


@dataclasses.dataclass(frozen=True)
class TextAugment:
  """The changes that may be made to a caption: stop words are left out first, then at most one of the others happens.

  Attributes:
    stop_words: probability that English words such as articles are left out; a caption of nothing else stays.
    swap: probability that two of the words change places.
    delete: probability that words are left out, each with probability `share`, and never all of them.
    insert: probability that punctuation marks are put between words, one for each `share` of them, at least one.
    share: share of the words that "delete" leaves out on average, and that "insert" adds marks for.

  The operations of Wei and Zou, "EDA" (arXiv 1901.11196), but for those that need a dictionary of synonyms, with the
  insertion of Karimi et al., "AEDA" (arXiv 2108.13230). That only one of them happens, and the defaults, are as in
  "Improved baselines for vision-language pre-training" (arXiv 2305.08675), where synonyms have a probability of 0.4.

  Examples:
    >>> augment = TextAugment(stop_words=1.0, swap=1.0, delete=0.0)
    >>> augment("a dog and the ball", 0.25)
    'ball dog'
  """

  stop_words: float = 0.8
  swap: float = 0.4
  delete: float = 0.2
  insert: float = 0.0
  share: float = 0.1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= getattr(self, field.name) <= 1:
        raise UserError(f"{field.name}={getattr(self, field.name)} must be a probability between 0 and 1")
    if self.swap + self.delete + self.insert > 1 + 1e-6:
      raise UserError(
        f"swap={self.swap}, delete={self.delete} and insert={self.insert} exclude each other: their sum must be at"
        " most 1"
      )

  def __call__(self, caption: str, draw: float) -> str:
    """Returns a changed caption, whose words are separated by single spaces; as it is where nothing happens.

    Args:
      caption: the caption.
      draw: a uniform number in [0, 1) that decides everything.
    """
    generator = random.Random(int(draw * 2**53))
    words = before = caption.split()
    if generator.random() < self.stop_words:
      kept = [word for word in words if word.strip(string.punctuation).casefold() not in STOP_WORDS]
      words = kept or words
    kind = generator.random()
    if kind < self.swap:
      words = _swapped(words, generator)
    elif kind < self.swap + self.delete:
      words = [word for word in words if generator.random() >= self.share] or words
    elif kind < self.swap + self.delete + self.insert:
      words = _with_marks(words, max(1, round(self.share * len(words))), generator)
    return caption if words == before else " ".join(words)


def _swapped(words: list[str], generator: random.Random) -> list[str]:
  if len(words) < 2:
    return words
  words = list(words)
  first = int(generator.random() * len(words))
  second = (first + 1 + int(generator.random() * (len(words) - 1))) % len(words)
  words[first], words[second] = words[second], words[first]
  return words


def _with_marks(words: list[str], count: int, generator: random.Random) -> list[str]:
  words = list(words)
  for _ in range(count):
    words.insert(1 + int(generator.random() * len(words)), _MARKS[int(generator.random() * len(_MARKS))])
  return words
