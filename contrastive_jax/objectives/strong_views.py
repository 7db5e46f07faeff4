"""The term of strong views: images and captions that are changed much, embedded by heads of their own."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from contrastive_jax import losses
from contrastive_jax.bounds import BELOW_ONE, COUNT, Range, within
from contrastive_jax.losses import pairwise
from contrastive_jax.losses.cross_correlation import standardized
from contrastive_jax.losses.negatives import accumulation_dtype
from contrastive_jax.models.layers import l2_normalize
from contrastive_jax.objectives import perceptron
from contrastive_jax.objectives.term import Arrays, GlobalTerm, Pairs, Sizes, Variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrongViews(GlobalTerm):
  """The mean softmax loss between each of some strong views of the images and each of some changed captions.

  The towers embed the views, and perceptrons of three layers, one for each tower, bring their features into a space of
  its own, with a learned temperature of its own. The embeddings of the model, which it trains beside another term, see
  the views of `data.augment` alone. `data.strong_augment` and `data.text_augment` say how much the views are changed.
  Changed captions that are equal are not each other's negatives.

  Attributes:
    views: number of strong views of each image, and of changed captions of each pair.
    hidden: size of the hidden layers; None is four times that of the embeddings. The authors use 4,096 with embeddings
      of 256.
    temperature: the first value of the temperature, whose inverse stays below `max_logit_scale`.
    label_smoothing: share of the target spread evenly over all classes that are not masked, the right one included.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.

  The multi-view loss of "Improved baselines for vision-language pre-training" (arXiv 2305.08675), whose sum with the
  plain loss is `objective = {"softmax": 1 / 3, "strong_views": 2 / 3}` for two views. Hidden features are standardised
  over the whole batch.
  """

  views: int = within(COUNT, 2)
  hidden: int | None = within(COUNT, None)
  temperature: float = within(Range(0, 1, above=True), 0.1)
  label_smoothing: float = within(BELOW_ONE, 0.1)
  strategy: str = "gather"
  tile: int | None = within(COUNT, None)

  compares_pairs: ClassVar[bool] = True

  @property
  def strong_images(self) -> int:
    return self.views

  @property
  def strong_texts(self) -> int:
    return self.views

  def unlearned(self, pairs: int) -> float:
    return math.log(pairs)

  def params(self, sizes: Sizes) -> Arrays:
    hidden = self.hidden or 4 * sizes.embed_dim
    model = sizes.model
    widths = [sizes.embed_dim] * 2 if model is None else [model.image.transformer.width, model.text.transformer.width]
    first = -math.log(self.temperature)
    return {
      "log_logit_scale": Variable((), (), lambda _, shape: jnp.full(shape, first, jnp.float32)),
      **{
        tower: perceptron.variables((width, hidden, hidden, sizes.embed_dim), number=number, normed=True)
        for number, (tower, width) in enumerate(zip(("image", "text"), widths, strict=True))
      },
    }

  def __call__(self, pairs: Pairs, params, state, *, axis_name=None, **exchange: Any):
    axes = pairwise.mesh_axes(axis_name)
    images = self._embedded(params["image"], pairs.strong_image, axes)
    texts = self._embedded(params["text"], pairs.strong_text, axes)
    scale = jnp.exp(params["log_logit_scale"])

    def loss(views):
      image, text, caption_keys = views
      return losses.softmax_loss(
        image,
        text,
        logit_scale=scale,
        label_smoothing=self.label_smoothing,
        group=jnp.concatenate([pairs.keys, caption_keys[:, None]], axis=1),
        strategy=self.strategy,
        tile=self.tile,
        axis_name=axis_name,
        **exchange,
      )

    of_image, of_text = np.indices((len(images), len(texts))).reshape(2, -1)
    caption_keys = jnp.moveaxis(pairs.strong_keys[:, : self.views], 1, 0)
    # One after the other, so that the program does not grow with the square of the number of views.
    found = lax.map(loss, (images[of_image], texts[of_text], caption_keys[of_text]))
    value, metrics = jax.tree.map(jnp.mean, found)
    return value, state, {**metrics, "logit_scale": scale}

  def _embedded(
    self, params: Arrays, features: Float[Array, "pairs views width"], axes: tuple[str, ...]
  ) -> Float[Array, "views pairs dim"]:
    """Returns the embeddings of each view, in the dtype of the features."""
    wide = jnp.moveaxis(features[:, : self.views].astype(accumulation_dtype(features)), 1, 0)
    over_batch = jax.vmap(functools.partial(standardized, axes=axes))
    return l2_normalize(perceptron.apply(params, wide, over_batch)).astype(features.dtype)
