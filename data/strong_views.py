"""Strong views of consecutive pairs: several views of each image, and several changed captions of each pair."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from contrastive_jax.preprocess.tokenizers import CaptionEncoder
from contrastive_jax.schedule.segments import Inputs
from data.augment import DRAWS
from data.mixture import uniforms, whole_blocks
from data.numbering import words_of
from data.rendering import Renderer
from data.sources import Example, stable_hash
from data.text_augment import TextAugment


def strong_images(
  examples: Sequence[Example],
  inputs: Inputs,
  length: int,
  render: Renderer,
  views: int,
  dropping: Float[np.ndarray, "pairs patches"] | None,
  *,
  seed: int,
  position: int,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Renders strong views of images.

  Args:
    examples: the samples of the pairs.
    inputs: the sizes, frames and rows of the step.
    length: patches of a row that is not packed before any are dropped.
    render: renders a strong view.
    views: number of views of each image.
    dropping: the uniform draws that decide which patches of an image, and of its views, are dropped; None drops none.
    seed: seed of the run.
    position: position of the first pair in the run.

  Returns:
    The fields `patches` and `places` of `StrongViews`.
  """
  count = len(examples)
  draws = uniforms(seed, "strong images", position, count, views * DRAWS).reshape(count, views, DRAWS)
  # The size of a view depends on its image alone, so that the patches lie where those of `Batch.image` do.
  patches = [render(examples, inputs, draws[:, k], length, dropping)[0].patches for k in range(views)]
  places = None
  if inputs.resolution.mode == "fixed":
    pixels, flips = [example.image for example in examples], [example.flip for example in examples]
    size, of_view = inputs.resolution.size, render.augment.places
    places = np.stack([of_view(pixels, flips, size, draws[:, k]) for k in range(views)], axis=1)
  return np.stack(patches, axis=1), places


def strong_texts(
  captions: Sequence[str],
  change: TextAugment,
  tokenizer: CaptionEncoder,
  length: int,
  views: int,
  *,
  seed: int,
  position: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Changes captions.

  Args:
    captions: the captions of the pairs.
    change: the changes.
    tokenizer: the tokenizer of the captions.
    length: number of tokens of a caption.
    views: number of changed captions of each pair.
    seed: seed of the run.
    position: position of the first pair in the run.

  Returns:
    The fields `tokens`, `mask` and `keys` of `StrongViews`.
  """
  count = len(captions)
  draws = uniforms(seed, "strong texts", position, count, whole_blocks(views))[:, :views].tolist()
  changed = [change(caption, draw) for caption, own in zip(captions, draws, strict=True) for draw in own]
  # Hardly any of them comes again, so that they have no place among the tokens that are kept.
  tokens, mask = (part.reshape(count, views, length) for part in tokenizer(changed, length))
  keys = words_of(np.array([stable_hash(caption) for caption in changed], np.uint64).reshape(count, views))
  return tokens, mask, keys
