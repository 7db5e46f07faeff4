"""Captions that nearly fit an image and are wrong: those of a set, and captions of which two words are exchanged."""

from collections.abc import Sequence

from data.sources import Text

# Uniform draws that the choice of a caption uses.
DRAWS_EACH = 3


def swapped(caption: str, first: float, second: float) -> str | None:
  """Exchanges two words of a caption that differ; None where it has no two.

  Args:
    caption: the caption.
    first: a uniform number in [0, 1) that chooses one of them.
    second: another that chooses the other one.

  A simple form of the swaps of Yuksekgonul et al., "When and why vision-language models behave like bags-of-words"
  (arXiv 2210.01936), which exchange words of one kind.

  Examples:
    >>> swapped("a dog bites a man", 0.2, 0.9), swapped("dog dog", 0.2, 0.9)
    ('a man bites a dog', None)
  """
  words = caption.split()
  folded = [word.casefold() for word in words]
  if len(set(folded)) < 2:
    return None
  one = int(first * len(words))
  others = [k for k, word in enumerate(folded) if word != folded[one]]
  other = others[int(second * len(others))]
  words[one], words[other] = words[other], words[one]
  return " ".join(words)


def chosen(text: Text, caption: str, count: int, swap: bool, draws: Sequence[float]) -> list[str | None]:
  """Chooses wrong captions of a pair, each at most once.

  Args:
    text: the captions of its sample, right and wrong ones.
    caption: the caption of the pair.
    count: number of captions that are wanted.
    swap: whether those that the sample lacks are made by `swapped`.
    draws: `DRAWS_EACH * count` uniform numbers in [0, 1).

  Returns:
    `count` captions, None for each that there is not.

  Examples:
    >>> chosen(Text(("a dog",), 0, wrong=("a cat", "a dog")), "a dog", 2, False, [0.5] * 6)
    ['a cat', None]
  """
  right = {caption, *text.captions}
  left = [wrong for wrong in text.wrong if wrong not in right]
  found: list[str | None] = []
  for k in range(count):
    which, first, second = draws[DRAWS_EACH * k : DRAWS_EACH * (k + 1)]
    if left:
      found.append(left.pop(int(which * len(left))))
      continue
    made = swapped(caption, first, second) if swap else None
    found.append(None if made in found or made in right else made)
  return found
