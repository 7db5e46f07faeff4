"""Sets of clips are evaluated like sets of images."""

import numpy as np

from contrastive_jax.evaluation.results import THUMBNAIL_SIZE, headline, thumbnail
from contrastive_jax.evaluation.retrieval import evaluate_retrieval
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from contrastive_jax.evaluation.zero_shot import evaluate_zero_shot
from contrastive_jax.preprocess.video import ArrayClip


def clips(count: int) -> list[ArrayClip]:
  """Clip i has eight plain frames of levels 10 i to 10 i + 7."""
  levels = 10 * np.arange(count)[:, None] + np.arange(8)
  return [ArrayClip(np.broadcast_to(row[:, None, None, None], (8, 20, 30, 3)).astype(np.uint8)) for row in levels]


class Encoder:
  """Knows clip i and text i."""

  logit_scale = 10.0

  def encode_image(self, images):
    return np.eye(8, dtype=np.float32)[[int(images[i].read([0])[0, 0, 0, 0]) // 10 for i in range(len(images))]]

  def encode_text(self, texts):
    return np.eye(8, dtype=np.float32)[[int(text) for text in texts]]


def test_zero_shot_shows_clips_as_sheets_of_frames():
  labels = np.array([0, 1, 2, 3, 5, 4])
  result = evaluate_zero_shot(Encoder(), LabelledSet("toy", clips(6), labels, list("012345"), ["{}"]))
  assert result.metrics["acc1"] == 4 / 6 and result.sizes == {"clips": 6, "classes": 6}
  assert headline(result)["sentence"].startswith("of 6 clips are classified correctly among 6 classes")
  guess = next(guess for guess in result.guesses if guess.truth == "3")
  assert guess.image.shape == (42, 62, 3)
  corners = guess.image[[0, 0, -1, -1], [0, -1, 0, -1], 0]
  # The middles of four parts of eight frames, in reading order.
  assert corners.tolist() == [31, 33, 35, 37]
  assert {confusion.image.shape for confusion in result.confusions} == {(42, 62, 3)}


def test_retrieval_finds_clips():
  numbers = np.arange(6)
  result = evaluate_retrieval(Encoder(), PairSet("toy", clips(6), list("012345"), numbers, numbers), examples=2)
  assert result.metrics["image_retrieval_recall@1"] == result.metrics["text_retrieval_recall@1"] == 1
  assert headline(result)["sentence"] == "of 6 captions rank their clip among the first 5 of 6"
  assert result.searches[0].found[0][0].shape == (42, 62, 3)


def test_thumbnails_are_small_and_on_white(rng):
  tall = ArrayClip(rng.integers(0, 256, (3, 400, 100, 3), dtype=np.uint8))
  assert max(thumbnail(tall).shape) <= THUMBNAIL_SIZE
  ghost = np.zeros((5, 10, 10, 4), np.uint8)
  ghost[..., 3] = 0
  assert thumbnail(ArrayClip(ghost))[0, 0].tolist() == [255] * 3
  drawing = np.zeros((8, 40, 4), np.uint8)
  assert (thumbnail(drawing) == 255).all() and thumbnail(drawing).shape == (8, 40, 3)
