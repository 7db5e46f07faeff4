"""Hard pairs: captions that differ in a word or in its order, of which each belongs to one image.

An instance of SugarCrepe is an image with a true and a false caption, one of Winoground two images with two captions.
Numbers agree with CLIP_benchmark's image_caption_selection.
"""

import numpy as np
from jaxtyping import Array, Float

from contrastive_jax.evaluation.arrays import checked
from contrastive_jax.evaluation.results import Result
from contrastive_jax.evaluation.tasks import ChoiceSet, Encoder, kind_of


@checked
def choice_accuracy(
  image: Float[Array | np.ndarray, "instances images dim"],
  caption: Float[Array | np.ndarray, "instances captions dim"],
) -> dict[str, float]:
  """Computes how often the right caption, and the right image, is chosen within an instance.

  Args:
    image: L2-normalised embeddings of the images of each instance.
    caption: L2-normalised embeddings of its captions. Caption `k` belongs to image `k`, and captions beyond the images,
      or images beyond the captions, are there to be wrongly chosen.

  Returns:
    text_acc, the share of instances whose images all choose their own caption: Winoground's text score, SugarCrepe's
    accuracy. image_acc, the share whose captions all choose their own image: Winoground's image score, always 1 for one
    image. acc, the share of which both are true: Winoground's group score.

  Follows CLIP_benchmark's image_caption_selection, whose argmax gives equal scores to the first: an encoder that embeds
  everything alike is right on SugarCrepe, and wrong on Winoground.

  Examples:
    >>> image = np.float32([[[1, 0]]])  # One instance of one image and two captions, as in SugarCrepe.
    >>> choice_accuracy(image, np.float32([[[0.6, 0.8], [0.8, 0.6]]]))
    {'image_acc': 1.0, 'text_acc': 0.0, 'acc': 0.0}
  """
  scores = np.einsum("nid,ncd->nic", np.asarray(image), np.asarray(caption))
  right = np.arange(min(scores.shape[1:]))
  text = np.all(scores.argmax(axis=2)[:, : len(right)] == right, axis=1)
  images = np.all(scores.argmax(axis=1)[:, : len(right)] == right, axis=1)
  return {"image_acc": float(images.mean()), "text_acc": float(text.mean()), "acc": float((images & text).mean())}


def evaluate_choices(model: Encoder, scored: ChoiceSet) -> Result:
  """Matches images and captions within each instance.

  Args:
    model: the model, which embeds images and captions.
    scored: the set; its images are read a batch at a time, and only embeddings are kept.

  Returns:
    The metrics of `choice_accuracy`.
  """
  instances = len(scored.captions)
  captions = [caption for some in scored.captions for caption in some]
  image, caption = model.encode_image(scored.images), model.encode_text(captions)
  image, caption = (rows.reshape(instances, -1, rows.shape[1]) for rows in (image, caption))
  return Result(
    dataset=scored.name,
    task="image_caption_selection",
    metrics=choice_accuracy(image, caption),
    language=scored.language,
    sizes={kind_of(scored.images): len(scored.images), "captions": len(captions), "instances": instances},
  )
