import dataclasses
import json

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.results import (
  Result,
  headline,
  percent,
  read_result,
  read_results,
  result_path,
  thumbnail,
  write_result,
)

CLASSIFICATION = Result(
  dataset="tfds/cifar10",
  task="zeroshot_classification",
  metrics={"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25},
  language="en",
  sizes={"images": 4, "classes": 10},
)


def test_json_has_the_schema_of_clip_benchmark(tmp_path):
  path = result_path(tmp_path / "run", "tfds/cifar10", 300)
  assert path == tmp_path / "run" / "eval" / "tfds_cifar10@300.json"
  assert write_result(path, CLASSIFICATION, model="clip_ti16", pretrained="runs/émoji") == path
  expected = {
    "dataset": "tfds/cifar10",
    "model": "clip_ti16",
    "pretrained": "runs/émoji",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25},
    "language": "en",
  }
  written = json.loads(path.read_text(encoding="utf-8"))
  assert len(written.pop("digest")) == 64 and written == expected == read_result(path)


BAD_METRICS = (b"", b'"acc1": NaN', b'"acc1": null', b'"acc1": "0.5"', b'"acc1": true', b'"acc1": Infinity')
BAD_METRICS += (b'"uniformity_text": 0.5', b'"image_retrieval_recall@": 0.5', b'"acc1": 0.5, "acc5": -Infinity')


@pytest.mark.parametrize(
  "content",
  [
    *(b"", b"[]", b'{"dataset": "x"}', b'{"dataset": 1, "task": "", "metrics": {}}'),
    *(b'{"dataset": "x", "task": "t", "metrics": {%s}}' % metrics for metrics in BAD_METRICS),
  ],
)
def test_a_damaged_result_is_left_out_and_named(content, tmp_path, caplog):
  sound, damaged = tmp_path / "a.json", tmp_path / "b.json"
  write_result(sound, CLASSIFICATION, model="m", pretrained="p")
  damaged.write_bytes(content)
  assert [path for path, _ in read_results([sound, damaged])] == [sound] and str(damaged) in caplog.text
  with pytest.raises(UserError, match=r"b\.json"):
    read_result(damaged)


def test_no_digit_of_a_result_changes_unnoticed(tmp_path):
  path = write_result(tmp_path / "a.json", CLASSIFICATION, model="m", pretrained="p")
  expected, content = read_result(path), path.read_bytes()
  for place in range(len(content)):
    for bit in range(8):
      damaged = bytearray(content)
      damaged[place] ^= 1 << bit
      path.write_bytes(damaged)
      try:
        assert read_result(path) == expected
      except UserError as error:
        assert str(path) in str(error)
  path.write_text('{"dataset": "x", "task": "t", "metrics": {"acc1": 0.5}}')  # Of a version without digests.
  assert read_result(path)["metrics"] == {"acc1": 0.5}


def test_json_tells_where_prompts_come_from_that_are_not_the_sets_own(tmp_path):
  result = dataclasses.replace(CLASSIFICATION, templates_source="a generic one")
  path = write_result(tmp_path / "a.json", result, model="m", pretrained="p")
  assert json.loads(path.read_text())["templates_source"] == "a generic one"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  write_result(path, CLASSIFICATION, model="m", pretrained="p")
  before = path.read_text()

  def fails(self, *_):
    raise OSError("disk full")

  monkeypatch.setattr("pathlib.Path.replace", fails)
  with pytest.raises(OSError, match="disk full"):
    write_result(path, CLASSIFICATION, model="other", pretrained="p")
  assert path.read_text() == before
  assert list(tmp_path.iterdir()) == [path]


def test_the_result_of_a_probe_is_not_taken_for_the_zero_shot_one(tmp_path):
  tasks = ("", "linear_probe", "unprojected_linear_probe", "5_shot_linear_probe", "unprojected_5_shot_knn_probe")
  paths = [result_path(tmp_path, "tfds/digits@train", 300, task) for task in tasks]
  for path, task in zip(paths, tasks, strict=True):
    write_result(path, dataclasses.replace(CLASSIFICATION, task=task), model="m", pretrained="p")
  assert len(set(paths)) == 5 and paths[0].parent == paths[1].parent
  # What the stages of a run and a finished run are looked up by.
  assert list((tmp_path / "eval").glob("*@300.json")) == [paths[0]]


@pytest.mark.parametrize(
  ("size", "expected"),
  [((300, 200, 3), (112, 75, 3)), ((72, 72, 3), (72, 72, 3)), ((5000, 8, 3), (112, 1, 3))],
)
def test_thumbnails_are_small_and_keep_their_shape(size, expected):
  assert thumbnail(np.zeros(size, np.uint8)).shape == expected


def test_headline_names_the_figure_and_chance():
  assert headline(CLASSIFICATION)["figure"] == "50.0%"
  assert headline(CLASSIFICATION)["sentence"] == (
    "of 4 images are classified correctly among 10 classes: 5 times chance (10.0%)"
  )
  retrieval = Result(
    dataset="coco",
    task="zeroshot_retrieval",
    metrics={"image_retrieval_recall@1": 0.1, "image_retrieval_recall@10": 0.3, "text_retrieval_recall@5": 0.9},
    language="en",
    sizes={"images": 5000, "captions": 25000},
  )
  assert headline(retrieval)["figure"] == "30.0%"
  assert headline(retrieval)["sentence"] == "of 25,000 captions rank their image among the first 10 of 5,000"


@pytest.mark.parametrize(
  ("metrics", "sizes", "expected"),
  [
    (
      {"mean_average_precision": 0.5},
      {"images": 4952, "classes": 20},
      "mean average precision of 20 classes among 4,952 images",
    ),
    (
      {"lp_acc1": 0.5, "lp_mean_per_class_recall": 0.25},
      {"images": 360, "classes": 10, "training": 1437},
      "of 360 images are classified correctly by a linear probe trained on 1,437 images",
    ),
    (
      {"image_acc": 1.0, "text_acc": 0.5, "acc": 0.5},
      {"images": 300, "captions": 600, "instances": 300},
      "of 300 groups of images and similar captions are matched correctly",
    ),
  ],
)
def test_headlines_of_other_tasks(metrics, sizes, expected):
  words = headline(Result("toy", "task", metrics, "en", sizes))
  assert (words["figure"], words["sentence"]) == ("50.0%", expected)


def test_a_headline_says_which_features_a_probe_saw():
  sizes = {"images": 360, "classes": 10, "training": 50}
  words = headline(Result("toy", "unprojected_5_shot_knn_probe", {"knn_acc1": 0.5}, "en", sizes))
  assert words["sentence"] == (
    "of 360 images are classified correctly by a nearest-neighbour classifier trained on the unprojected"
    " features of 50 images"
  )


def test_a_headline_says_that_embeddings_have_collapsed_and_which_features_were_scored():
  sizes = {"images": 60, "captions": 60}
  metrics = {"image_retrieval_recall@1": 0.5, "rank_image": 2.5, "rank_text": 40.0}
  plain = "of 60 captions rank their image among the first 1 of 60"
  told = "; the image embeddings use fewer than 3 directions: they have collapsed"
  assert headline(Result("toy", "zeroshot_retrieval", metrics, "en", sizes))["sentence"] == plain + told
  # Few images vary in few directions, and so do few features.
  few = headline(Result("toy", "zeroshot_retrieval", metrics, "en", {"images": 3, "captions": 60}))
  assert "collapsed" not in few["sentence"]
  part = headline(Result("toy", "first_4_zeroshot_retrieval", metrics, "en", sizes))
  assert part["sentence"] == plain + ", by the first 4 features of the embeddings"


def test_percentages():
  assert [percent(x) for x in (0.00054, 0.0942, 1.0, 0.0)] == ["0.05%", "9.4%", "100.0%", "0.00%"]
