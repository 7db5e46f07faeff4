"""What is done to captions before they are tokenized, as in the libraries that weights come from."""

import dataclasses
import functools
import html
import string
import unicodedata

from tokenizers import normalizers

# The straight quotes that ftfy makes of curly ones, by their code points.
STRAIGHT_QUOTES = dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Cleaning:
  """Cleans captions, by these steps in this order.

  Attributes:
    mended: captions are mended as open_clip does before any of its tokenizers, see `mended`.
    lowercase: captions are lower-cased as whole texts.
    canonical: captions lose their punctuation, see `canonical`.
    joined: an underscore that `canonical` drops joins the words beside it, as in transformers, instead of parting them,
      as in big_vision.
  """

  mended: bool = False
  lowercase: bool = False
  canonical: bool = False
  joined: bool = False

  def __call__(self, text: str) -> str:
    if self.mended:
      text = mended(text)
    if self.lowercase:
      text = text.lower()
    return canonical(text, joined=self.joined) if self.canonical else text


def canonical(text: str, *, joined: bool = False) -> str:
  """Removes ASCII punctuation and repeated spaces, as big_vision does with SigLIP's prompts.

  Args:
    text: the caption.
    joined: an underscore joins the words beside it, as in transformers, instead of parting them.

  Examples:
    >>> canonical("A photo of  a dog.")
    'A photo of a dog'
  """
  parted = text if joined else text.replace("_", " ")
  return " ".join(parted.translate(_NO_PUNCTUATION).split())


def mended(text: str) -> str:
  """Replaces HTML's entities and what ftfy would, and makes white space single, as open_clip does with captions.

  Examples:
    >>> mended("  salt &amp; pepper\\n")
    'salt & pepper'
  """
  return " ".join(html.unescape(html.unescape(text.translate(_repairs()))).split())


def lowered(text: str) -> str:
  """Lower-cases letter by letter, where Python knows a Greek letter that is another at the end of a word."""
  return normalizers.Lowercase().normalize_str(text)


@functools.cache
def _repairs() -> dict[int, str]:
  """Characters that ftfy replaces: curly quotes, Latin ligatures, full-width and half-width forms."""
  compatible = [0x0132, 0x0133, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07), 0x3000]
  compatible += range(0xFF01, 0xFFF0)
  return STRAIGHT_QUOTES | {code: unicodedata.normalize("NFKC", chr(code)) for code in compatible}
