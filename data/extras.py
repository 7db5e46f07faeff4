"""What the batches of a run bring beside images, captions and keys, read from the samples of consecutive pairs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from contrastive_jax.batch import HardCaptions, StrongViews, Targets, TeacherInputs, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.tokenizers import CaptionEncoder
from contrastive_jax.schedule.extras import NO_EXTRAS, Extras
from contrastive_jax.schedule.segments import Inputs
from data import hard_captions
from data.augment import STRONG, Augment
from data.mixture import uniforms, whole_blocks
from data.numbering import row_bases
from data.rendering import Renderer
from data.sources import Example, Source
from data.strong_views import strong_images, strong_texts
from data.text_augment import TextAugment
from data.token_cache import TokenCache

_PLAIN_TEXTS = TextAugment()


@dataclasses.dataclass(frozen=True)
class TeacherView:
  """The views of the pairs that a frozen teacher reads, which runs beside the student.

  Attributes:
    size: side of its images in pixels.
    patch_size: side of its patches in pixels.
    tokenizer: tokenizer of its text tower, or None where no term needs its captions.
    text_length: number of tokens of its captions.
  """

  size: int
  patch_size: int
  tokenizer: CaptionEncoder | None = None
  text_length: int = 0


@dataclasses.dataclass(frozen=True)
class ExtrasOptions:
  """What batches bring beside images, captions and keys, and how it is made.

  Attributes:
    asked: what the objective asks for.
    swap_words: whether wrong captions that a sample lacks are made by an exchange of two words of the pair's caption.
    strong_augment: the strong views of images.
    text_augment: the changes of captions.
    teacher: the views of a frozen teacher, whose inputs are then part of every batch that it is shown.
    targets: a function that looks up outputs of a frozen teacher by sample ids.
  """

  asked: Extras = NO_EXTRAS
  swap_words: bool = False
  strong_augment: Augment = STRONG
  text_augment: TextAugment = _PLAIN_TEXTS
  teacher: TeacherView | None = None
  targets: Callable[[Int[np.ndarray, "pairs"]], Targets] | None = None

  def check(self, sources: Mapping[str, Source]) -> None:
    """Raises a `UserError` for an option or a column of a source that has no use, and for a use without a column."""
    asked = self.asked
    for key, used, option in (
      ("weight_key", asked.weights, "loss_options.softmax.pair_weights=True"),
      ("wrong_caption_key", asked.hard_captions > 0, "loss_options.softmax.hard_captions=1"),
    ):
      having = [name for name, source in sources.items() if getattr(source, key, "")]
      if having and not used:
        raise UserError(f"{key} of data source {having[0]!r} has no use: leave it out, or set {option}")
      if used and not having and not (asked.hard_captions and self.swap_words):
        more = ", or set data.swap_words=True" if asked.hard_captions else ""
        raise UserError(f"{option} finds no source with a {key}: give it to an entry of data.sources{more}")
    if self.swap_words and not asked.hard_captions:
      raise UserError("data.swap_words=True has no use: leave it out, or set loss_options.softmax.hard_captions=1")
    for field, changed, used in (
      ("strong_augment", self.strong_augment != STRONG, asked.strong_images),
      ("text_augment", self.text_augment != _PLAIN_TEXTS, asked.strong_texts),
    ):
      if changed and not used:
        raise UserError(f"data.{field} has no use: leave it as it is, or add strong_views to the objective")


NO_OPTIONS = ExtrasOptions()


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Consecutive pairs of a step.

  Attributes:
    position: position of the first of them in the run.
    names: the source of each.
    examples: the sample of each.
    captions: the caption of each, as it is read.
    draws: the uniform draws of the view of each image, as `Augment` takes them.
    dropping: the uniform draws of each image that decide which of its patches are dropped; None where none are.
    taught: whether a frozen teacher sees them.
  """

  position: int
  names: Sequence[str]
  examples: Sequence[Example]
  captions: list[str]
  draws: Float[np.ndarray, "pairs draws"]
  dropping: Float[np.ndarray, "pairs patches"] | None
  taught: bool


class ExtrasMaker:
  """Makes what batches bring beside images, captions and keys."""

  def __init__(
    self,
    options: ExtrasOptions,
    lengths: Mapping[str, int],
    tokenizer: CaptionEncoder,
    tokenize: TokenCache,
    render: Renderer,
    *,
    seed: int,
  ):
    """Prepares for the sources of a run.

    Args:
      options: what is made, and how.
      lengths: number of samples of each source.
      tokenizer: the tokenizer of the captions.
      tokenize: tokenizes captions, and remembers them.
      render: renders the views that the model learns to embed.
      seed: seed of the run.
    """
    self._options, self._lengths, self._seed = options, lengths, seed
    self._tokenizer, self._tokenize, self._render = tokenizer, tokenize, render
    self._render_strongly = dataclasses.replace(render, augment=options.strong_augment)
    self._row_base = row_bases(lengths) if options.asked.state_rows else None

  def __call__(self, pairs: Pairs, inputs: Inputs, length: int, text_length: int) -> dict[str, Any]:
    """Makes them for consecutive pairs.

    Args:
      pairs: the pairs.
      inputs: the sizes, frames and rows of the step.
      length: patches of a row that is not packed before any are dropped.
      text_length: number of tokens of a caption.

    Returns:
      Fields of `Batch` by their names, None where they are not asked for.
    """
    asked, names = self._options.asked, pairs.names
    return {
      "state_rows": self._state_rows(pairs),
      "weights": np.array([e.text.weight for e in pairs.examples], np.float32) if asked.weights else None,
      "replayed": None if asked.replayed is None else _among(names, asked.replayed or names).astype(np.float32),
      "hard_captions": self._hard_captions(pairs, text_length) if asked.hard_captions else None,
      "present_in": {term: _among(names, some) for term, some in asked.present_in.items()},
      "strong": self._strong(pairs, inputs, length, text_length),
      "teacher": self._teacher_inputs(pairs, self._options.teacher) if self._options.teacher and pairs.taught else None,
    }

  def _state_rows(self, pairs: Pairs) -> Int[np.ndarray, "pairs"] | None:
    if self._row_base is None:
      return None
    for name, example in zip(pairs.names, pairs.examples, strict=True):
      if not 0 <= example.id < self._lengths[name]:
        raise UserError(
          f"data source {name!r} gives a sample the id {example.id}, with {self._lengths[name]} samples: an objective"
          " that keeps a state for every sample needs ids below that number"
        )
    rows = [self._row_base[name] + e.id for name, e in zip(pairs.names, pairs.examples, strict=True)]
    return np.array(rows, np.int32)

  def _hard_captions(self, pairs: Pairs, length: int) -> HardCaptions:
    count, captions = self._options.asked.hard_captions, pairs.captions
    each = hard_captions.DRAWS_EACH * count
    draws = uniforms(self._seed, "hard captions", pairs.position, len(captions), whole_blocks(each))[:, :each].tolist()
    found = [
      hard_captions.chosen(example.text, caption, count, self._options.swap_words, own)
      for example, caption, own in zip(pairs.examples, captions, draws, strict=True)
    ]
    # Where there is none, the pair's own stands in its place: it has tokens.
    flat = [wrong or caption for some, caption in zip(found, captions, strict=True) for wrong in some]
    rows = (part.reshape(len(captions), count, length) for part in self._tokenize(self._tokenizer, flat, length))
    return HardCaptions(*rows, np.array([[wrong is not None for wrong in some] for some in found]))

  def _strong(self, pairs: Pairs, inputs: Inputs, length: int, text_length: int) -> StrongViews | None:
    asked, where = self._options.asked, {"seed": self._seed, "position": pairs.position}
    patches = tokens = mask = keys = places = None
    if asked.strong_images:
      patches, places = strong_images(
        pairs.examples, inputs, length, self._render_strongly, asked.strong_images, pairs.dropping, **where
      )
    if asked.strong_texts:
      change = self._options.text_augment
      tokens, mask, keys = strong_texts(
        pairs.captions, change, self._tokenizer, text_length, asked.strong_texts, **where
      )
    return StrongViews(patches, tokens, mask, keys, places) if asked.strong_images or asked.strong_texts else None

  def _teacher_inputs(self, pairs: Pairs, teacher: TeacherView) -> TeacherInputs:
    view = dataclasses.replace(self._render, patch_size=teacher.patch_size)
    text = None
    if teacher.tokenizer is not None:
      text = TextBatch(*self._tokenize(teacher.tokenizer, pairs.captions, teacher.text_length))
    return TeacherInputs(view.squares(pairs.examples, pairs.draws, teacher.size), text)


def _among(names: Sequence[str], some: Sequence[str]) -> Bool[np.ndarray, "pairs"]:
  return np.array([name in some for name in names])
