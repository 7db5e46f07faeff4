import numpy as np
import pytest

from contrastive_jax.evaluation.choices import choice_accuracy, evaluate_choices
from contrastive_jax.evaluation.tasks import ChoiceSet


def winoground_scores(image, caption):
  """Text, image and group score as Winoground defines them, one comparison at a time."""
  text = images = group = 0
  for i, c in zip(image, caption, strict=True):
    s = {(a, b): float(c[a] @ i[b]) for a in (0, 1) for b in (0, 1)}  # Caption, image.
    text_right = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    image_right = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
    text, images, group = text + text_right, images + image_right, group + (text_right and image_right)
  return {"text_acc": text / len(image), "image_acc": images / len(image), "acc": group / len(image)}


def related(rng, instances, images, captions, dim=6):
  image = rng.normal(size=(instances, images, dim))
  caption = rng.normal(size=(instances, captions, dim))
  shared = min(images, captions)
  caption[:, :shared] += 0.7 * image[:, :shared]
  return (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, caption))


def test_two_images_and_two_captions_give_winogrounds_scores(rng):
  image, caption = related(rng, 300, 2, 2)
  expected = winoground_scores(image, caption)
  assert 0.2 < expected["acc"] < min(expected["text_acc"], expected["image_acc"]) < 0.9
  assert choice_accuracy(image, caption) == expected


def test_one_image_and_a_false_caption_give_sugarcrepes_accuracy(rng):
  image, caption = related(rng, 300, 1, 2)
  right = np.mean([i[0] @ c[0] > i[0] @ c[1] for i, c in zip(image, caption, strict=True)])
  assert 0.6 < right < 0.95
  assert choice_accuracy(image, caption) == {"text_acc": right, "image_acc": 1.0, "acc": right}


class Table:
  logit_scale = 1.0

  def __init__(self, image, caption):
    self.image, self.caption = image, caption

  def encode_image(self, images):
    return np.stack([self.image[images[k][0, 0, 0]] for k in range(len(images))])

  def encode_text(self, texts):
    return np.stack([self.caption[int(text)] for text in texts])


@pytest.mark.parametrize("images", [1, 2])
def test_a_set_is_read_instance_by_instance(images, rng):
  image, caption = related(rng, 40, images, 2)
  scored = ChoiceSet(
    "toy",
    [np.full((2, 2, 3), k, np.uint8) for k in range(40 * images)],
    [[str(2 * n), str(2 * n + 1)] for n in range(40)],
  )
  result = evaluate_choices(Table(image.reshape(-1, 6), caption.reshape(-1, 6)), scored)
  assert result.metrics == choice_accuracy(image, caption)
  assert result.sizes == {"images": 40 * images, "captions": 80, "instances": 40}


def test_instances_of_unequal_size_are_refused():
  picture = np.zeros((2, 2, 3), np.uint8)
  with pytest.raises(ValueError, match=r"equally many captions, got \[1, 2\]"):
    ChoiceSet("toy", [picture, picture], [["a"], ["b", "c"]])
  with pytest.raises(ValueError, match="2 instances have equally many images each, got 3"):
    ChoiceSet("toy", [picture] * 3, [["a"], ["b"]])
