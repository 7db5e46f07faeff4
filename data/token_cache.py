"""The tokens of captions, remembered since most captions come again in the next epoch."""

import numpy as np

from contrastive_jax.preprocess.tokenizers import CaptionEncoder

_MOST = 1 << 18


class TokenCache:
  """Tokenizes captions, and remembers those of up to `_MOST` captions. A copy in another process begins empty."""

  def __init__(self):
    self._rows: dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]] = {}

  def __call__(self, tokenizer: CaptionEncoder, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of captions and their mask, as the tokenizer does."""
    whose = tokenizer.fingerprint, length
    rows = {caption: self._rows.get((*whose, caption)) for caption in captions}
    new = [caption for caption, row in rows.items() if row is None]
    if new:
      tokens, mask = tokenizer(new, length)
      rows.update({caption: (tokens[k], mask[k]) for k, caption in enumerate(new)})
      if len(self._rows) + len(new) > _MOST:
        self._rows.clear()
      self._rows.update({(*whose, caption): rows[caption] for caption in new})
    return np.stack([rows[c][0] for c in captions]), np.stack([rows[c][1] for c in captions])

  def __reduce__(self):
    return TokenCache, ()
