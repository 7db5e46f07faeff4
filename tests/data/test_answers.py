"""Records of evaluation sets that say nothing of their pictures: a few are bad records, most are a wrong feature."""

import numpy as np
import pytest

from contrastive_jax.bad_records import BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import unreadable
from contrastive_jax.evaluation.tasks import LabelledSet
from contrastive_jax.preprocess.decoding import DecodeError
from data.sources import tfds
from data.sources.answers import answers, refuse_most

CAPTIONS = [
  ("a dog", ["a dog"]),
  (b"a dog", ["a dog"]),
  (["a", "b"], ["a", "b"]),
  (np.array([b"a", b"b"], object), ["a", "b"]),
  ({"text": "a"}, ["a"]),
  ({"en": ["a", "b"]}, ["a", "b"]),
  (["", "a", " "], ["a"]),
  ("a\u2028b", ["a\u2028b"]),
  ([], "no caption"),
  ("", "no caption"),
  (["\n", ""], "no caption"),
  (None, "no text"),
  (3, "no text"),
  (float("nan"), "no text"),
  ([["a"], ["b"]], "no text"),
  (["a", None], "no text"),
  ([b"a", 3], "no text"),
  ((), "no caption"),
  (b"\xff\xfe", "not UTF-8"),
  ("a\ud800", "not UTF-8"),
  ({"a": "x", "b": "y"}, "has the keys a, b"),
  ({3: "x", None: "y"}, "has the keys 3, None"),
]


@pytest.mark.parametrize(("value", "expected"), CAPTIONS)
def test_what_stands_for_a_caption(value, expected):
  found, bad = tfds.captions_of([{"caption": "a cat"}, {"caption": value}], "caption")
  assert found[0] == ["a cat"] and 0 not in bad
  if isinstance(expected, str):
    assert found[1] == [] and expected in bad[1]
  else:
    assert found[1] == expected and not bad


def test_images_of_records_without_an_answer_are_left_out_counted_and_named(tmp_path):
  records = [{"image": np.full((2, 2, 3), k, np.uint8), "label": label} for k, label in enumerate((0, 9, 1, -1, 1))]

  def label_of(record):
    if not 0 <= record["label"] < 2:
      raise DecodeError(f"label {record['label']} is none of 2 classes")
    return record["label"]

  labels, bad = answers(records, label_of, 0)
  images = tfds.Images(records, "image", bad=bad)
  scored = LabelledSet("toy", images, np.array(labels), ("even", "odd"), ("{}",))
  ledger = BadRecords(tmp_path / "bad_records.jsonl")
  _, good = unreadable.embedded(lambda images: np.ones((len([*images]), 3), np.float32), images, "toy", ledger)
  kept, rows = unreadable.keep(scored, good)
  assert rows.tolist() == [0, 2, 4] and kept.labels.tolist() == [0, 1, 1] and ledger.count == 2
  assert [image[0, 0, 0] for image in kept.images] == [0, 2, 4]
  assert "label 9 is none of 2 classes" in (tmp_path / "bad_records.jsonl").read_text()


def test_most_without_an_answer_are_refused():
  refuse_most({}, 0, "it", "")
  refuse_most({3: "why"}, 3, "it", "")
  with pytest.raises(UserError, match=r"^it has 2 of 4 records without, the first is 1 \(why\)$"):
    refuse_most({1: "why", 2: "x"}, 4, "it", "without, the first is {first} ({why})")
