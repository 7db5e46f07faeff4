import json

import numpy as np
import pytest

from contrastive_jax.evaluation.evaluate import evaluate, probe, scalars
from contrastive_jax.evaluation.probes import few_shot, knn_probe
from contrastive_jax.evaluation.tasks import ChoiceSet, LabelledSet, MultiLabelSet, PairSet


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
  multilabel = MultiLabelSet("toy_labels", images, np.eye(8, dtype=bool), names, ["number {}"])
  choices = ChoiceSet("toy_choices", images, [[name, str(7 - int(name))] for name in names])
  sets = [labelled, pairs, multilabel, choices]
  results = evaluate(Brightness(), sets, workdir=tmp_path, step=40, architecture="tiny")
  assert scalars(results) == {
    "tfds/toy/acc1": 1.0,
    "tfds/toy/acc5": 1.0,
    "tfds/toy/mean_per_class_recall": 1.0,
    # Always right, and as sure of it as scale 10 makes a cosine of 1 among seven of 0.
    "tfds/toy/expected_calibration_error": pytest.approx(7 / (np.exp(10) + 7), abs=1e-6),
    # Groups run backwards: query i finds item i, then the rest, all equal, by index. That brings 7 - i into the first
    # five for i = 3 ... 7.
    "toy_labels/mean_average_precision": 1.0,
    "toy_choices/image_acc": 1.0,
    "toy_choices/text_acc": 1.0,
    "toy_choices/acc": 1.0,
    "toy_pairs/image_retrieval_recall@1": 0.0,
    "toy_pairs/image_retrieval_recall@5": 0.625,
    "toy_pairs/text_retrieval_recall@1": 0.0,
    "toy_pairs/text_retrieval_recall@5": 0.625,
    # All that belongs together, and all but 8 of the 64 pairs of an image and a text, stands at right angles.
    "toy_pairs/alignment": 2.0,
    "toy_pairs/modality_gap": 0.0,
    "toy_pairs/uniformity_image": pytest.approx(-4.0),
    "toy_pairs/uniformity_text": pytest.approx(-4.0),
    "toy_pairs/uniformity_cross": pytest.approx(np.log((8 + 48 * np.exp(-4)) / 56)),
    # Eight corners vary in seven directions, equally. Of an image's seven negatives one is equal to it, and what
    # belongs to it stands at a right angle like the other six.
    "toy_pairs/rank_image": pytest.approx(7.0),
    "toy_pairs/rank_text": pytest.approx(7.0),
    "toy_pairs/effective_negatives": pytest.approx((np.exp(10) + 6) * np.exp(-10 * np.exp(10) / (np.exp(10) + 6))),
    "toy_pairs/weight_of_hardest": pytest.approx(np.exp(10) / (np.exp(10) + 6)),
    "toy_pairs/weight_of_positive": pytest.approx(1 - 1 / (np.exp(10) + 7)),
  }
  written = sorted(path.name for path in (tmp_path / "eval").iterdir())
  assert written == ["tfds_toy@40.json", "toy_choices@40.json", "toy_labels@40.json", "toy_pairs@40.json"]
  content = json.loads((tmp_path / "eval" / "toy_pairs@40.json").read_text())
  assert content["pretrained"] == f"{tmp_path}@40"
  assert (content["task"], content["language"], content["model"]) == ("zeroshot_retrieval", "mul", "tiny")


def test_what_takes_longer_is_added_when_asked_for(tmp_path):
  images = [np.full((2, 2, 3), i, np.uint8) for i in range(8)]
  names = [str(i) for i in range(8)]
  pairs = PairSet("pairs", images, names, np.arange(8), np.arange(8))
  labelled = LabelledSet("labelled", images, np.arange(8), names, ["{}"])
  about = {"workdir": tmp_path, "step": 1, "architecture": "tiny"}
  quick = evaluate(Brightness(), [pairs, labelled], **about)
  slow = evaluate(Brightness(), [pairs, labelled], thorough=True, **about)
  added = [slow[k].metrics.keys() - quick[k].metrics.keys() for k in (0, 1)]
  assert added == [{"global_auc", "modality_separability"}, set()]
  assert slow[0].metrics["global_auc"] == 1.0


def test_sets_that_share_their_images_have_them_embedded_once(tmp_path):
  class Counting(Brightness):
    calls = 0

    def encode_image(self, images):
      self.calls += 1
      return super().encode_image(images)

  images = [np.full((2, 2, 3), i, np.uint8) for i in range(8)]
  names = [str(i) for i in range(8)]
  sets = [LabelledSet(f"toy_{k}", images, np.arange(8), names, ["{}"], language=k) for k in ("de", "fr")]
  model = Counting()
  results = evaluate(model, sets, workdir=tmp_path, step=1, architecture="tiny")
  assert model.calls == 1
  assert [(result.language, result.metrics["acc1"]) for result in results] == [("de", 1.0), ("fr", 1.0)]


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_a_probe_lies_beside_the_zero_shot_result(kind, tmp_path):
  # The names are wrong, so that zero-shot is always wrong, and a probe, which does not read them, always right.
  images = [np.full((2, 2, 3), i % 8, np.uint8) for i in range(64)]
  names = [str((i + 1) % 8) for i in range(8)]
  train, test = (
    LabelledSet("tfds/toy", some, np.arange(len(some)) % 8, names, ["{}"]) for some in (images, images[:8])
  )
  about = {"workdir": tmp_path, "step": 7, "architecture": "tiny"}
  assert evaluate(Brightness(), [test], **about)[0].metrics["acc1"] == 0.0
  result = probe(Brightness(), train, test, kind=kind, **about)
  assert result.metrics[{"linear": "lp_acc1", "knn": "knn_acc1"}[kind]] == 1.0
  assert result.sizes == {"images": 8, "classes": 8, "training": 64}
  written = sorted(path.name for path in (tmp_path / "eval").iterdir())
  assert written == ["tfds_toy@7.json", f"tfds_toy@7.{kind}_probe.json"]


class Features(Brightness):
  """Before the projection the brightness, after it nothing."""

  def __init__(self):
    self.embedded = []

  def encode_image(self, images, projected=True):
    self.embedded.append(len(images))
    rows = super().encode_image(images)
    return np.ones_like(rows) if projected else rows


def test_a_probe_before_the_projection_sees_more_and_overwrites_nothing(tmp_path):
  images = [np.full((2, 2, 3), i % 8, np.uint8) for i in range(64)]
  train, test = (
    LabelledSet("toy", some, np.arange(len(some)) % 8, list("abcdefgh"), ["{}"]) for some in (images, images[:8])
  )
  about = {"kind": "knn", "workdir": tmp_path, "step": 7, "architecture": "tiny"}
  assert probe(Features(), train, test, **about).metrics["knn_acc1"] == 1 / 8
  assert probe(Features(), train, test, projected=False, **about).metrics["knn_acc1"] == 1.0
  written = {path.name: json.loads(path.read_text())["metrics"]["knn_acc1"] for path in (tmp_path / "eval").iterdir()}
  assert written == {"toy@7.knn_probe.json": 1 / 8, "toy@7.unprojected_knn_probe.json": 1.0}


def test_few_shots_are_the_mean_of_draws_and_embed_only_what_is_drawn(tmp_path, rng):
  # Half of each class looks like the next one: how good a draw is differs.
  labels = np.arange(320) % 8
  shown = np.where(rng.uniform(size=320) < 0.5, labels, (labels + 1) % 8)
  images = [np.full((2, 2, 3), i, np.uint8) for i in shown]
  train = LabelledSet("toy", images, labels, list("abcdefgh"), ["{}"])
  test = LabelledSet("toy", images[:8], labels[:8], list("abcdefgh"), ["{}"])
  model = Features()
  about = {"kind": "knn", "projected": False, "workdir": tmp_path, "step": 7, "architecture": "tiny"}
  result = probe(model, train, test, shots=2, **about)
  draws = [few_shot(labels, 2, seed=seed) for seed in range(3)]
  rows = np.eye(8, dtype=np.float32)[shown]
  expected = [knn_probe(rows[d], labels[d], rows[:8], labels[:8], classes=8)["knn_acc1"] for d in draws]
  assert len(set(expected)) > 1
  assert result.metrics["knn_acc1"] == pytest.approx(np.mean(expected), abs=1e-12)
  assert model.embedded == [len(set(np.concatenate(draws))), 8]
  assert result.sizes["training"] == 16
  assert [path.name for path in (tmp_path / "eval").iterdir()] == ["toy@7.unprojected_2_shot_knn_probe.json"]


class Nested(Brightness):
  """Embeddings whose first two features are the same for all, and tell nothing."""

  def encode_image(self, images):
    return self.with_constant(super().encode_image(images))

  def encode_text(self, texts):
    return self.with_constant(super().encode_text(texts))

  @staticmethod
  def with_constant(rows):
    return np.concatenate([np.full((len(rows), 2), 0.5, np.float32), rows], axis=1) / np.sqrt(np.float32(1.5))


def test_the_first_features_are_scored_beside_the_whole(tmp_path):
  images = [np.full((2, 2, 3), i, np.uint8) for i in range(8)]
  names = [str(i) for i in range(8)]
  labelled = LabelledSet("tfds/toy", images, np.arange(8), names, ["number {}"])
  whole, few, more = evaluate(Nested(), [labelled], workdir=tmp_path, step=4, architecture="tiny", dims=(2, 6))
  # Four classes have a feature among the first six; to an image of the others the texts of all four are equally near.
  assert [result.metrics["acc1"] for result in (whole, few, more)] == [1.0, 1 / 8, 5 / 8]
  assert (few.task, more.task) == ("first_2_zeroshot_classification", "first_6_zeroshot_classification")
  written = sorted(path.name for path in (tmp_path / "eval").iterdir())
  parts = [f"tfds_toy@4.first_{size}_zeroshot_classification.json" for size in (2, 6)]
  assert written == [*parts, "tfds_toy@4.json"]
