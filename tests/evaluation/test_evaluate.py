import json

import numpy as np

from contrastive_jax.evaluation.evaluate import evaluate, scalars
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet


class Brightness:
  """Embeds an image by its first pixel and a text by its last number: every answer is right."""

  logit_scale = 10.0

  def encode_image(self, images):
    return np.eye(8, dtype=np.float32)[[int(images[i][0, 0, 0]) for i in range(len(images))]]

  def encode_text(self, texts):
    return np.eye(8, dtype=np.float32)[[int(text.split()[-1]) for text in texts]]


def test_each_set_is_scored_in_its_way_and_written(tmp_path):
  images = [np.full((2, 2, 3), i, np.uint8) for i in range(8)]
  names = [str(i) for i in range(8)]
  labelled = LabelledSet("tfds/toy", images, np.arange(8), names, ["number {}"])
  pairs = PairSet("toy_pairs", images, names, np.arange(8), np.arange(8)[::-1], language="mul")
  results = evaluate(Brightness(), [labelled, pairs], workdir=tmp_path, step=40, architecture="tiny")
  assert scalars(results) == {
    "tfds/toy/acc1": 1.0,
    "tfds/toy/acc5": 1.0,
    "tfds/toy/mean_per_class_recall": 1.0,
    # Groups run backwards: query i finds item i, then the rest, all equal, by index. That brings 7 - i into the first
    # five for i = 3 ... 7.
    "toy_pairs/image_retrieval_recall@1": 0.0,
    "toy_pairs/image_retrieval_recall@5": 0.625,
    "toy_pairs/text_retrieval_recall@1": 0.0,
    "toy_pairs/text_retrieval_recall@5": 0.625,
  }
  written = sorted(path.name for path in (tmp_path / "eval").iterdir())
  assert written == ["tfds_toy@40.json", "toy_pairs@40.json"]
  content = json.loads((tmp_path / "eval" / "toy_pairs@40.json").read_text())
  assert content["pretrained"] == f"{tmp_path}@40"
  assert (content["task"], content["language"], content["model"]) == ("zeroshot_retrieval", "mul", "tiny")
