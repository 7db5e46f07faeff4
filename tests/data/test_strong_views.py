"""Strong views of images and captions: from a sample to the batch."""

import collections
import dataclasses

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Rows, Segment
from data.augment import Augment
from data.extras import ExtrasOptions
from data.pipeline import Pipeline
from data.sources import stable_hash
from data.text_augment import STOP_WORDS, TextAugment
from tests.data.toy import ToySource, WordTokenizer

CAPTION = "the dog on a mat and a cat"
CONTENT = ["dog", "on", "mat", "cat"]


def changed(draws, **options):
  augment = TextAugment(**{"stop_words": 0.0, "swap": 0.0, "delete": 0.0, **options})
  return [augment(CAPTION, draw) for draw in draws]


def test_captions_are_changed_as_often_as_the_options_say(rng):
  draws = rng.random(4000).tolist()
  words = CAPTION.split()
  assert set(changed(draws[:50])) == {CAPTION}
  assert set(changed(draws[:50], stop_words=1.0)) == {" ".join(CONTENT)} and not STOP_WORDS & set(CONTENT)
  swaps = [caption.split() for caption in changed(draws, swap=0.25)]
  assert all(sorted(each) == sorted(words) for each in swaps)
  # Both words may be "a", in one of the 28 choices of two: what is seen is 27 / 28 of a quarter.
  assert np.mean([each != words for each in swaps]) == pytest.approx(0.25 * 27 / 28, abs=0.03)
  kept = collections.Counter(word for caption in changed(draws, delete=1.0, share=0.3) for word in caption.split())
  assert [kept[word] / 4000 for word in CONTENT] == pytest.approx([0.7] * 4, abs=0.03)
  assert all(caption for caption in changed(draws[:100], delete=1.0, share=1.0))
  marked = [caption.split() for caption in changed(draws[:200], insert=1.0, share=0.25)]
  assert all(len(each) == len(words) + 2 and [word for word in each if word.isalpha()] == words for each in marked)
  assert TextAugment(stop_words=1.0)("the a", 0.5) in ("the a", "a the", "the", "a")
  with pytest.raises(UserError, match=r"swap=0\.7, delete=0\.4 and insert=0\.0 exclude each other"):
    TextAugment(swap=0.7, delete=0.4)


def pipeline(*segments, **options):
  captions = [(f"the picture of number {number}",) for number in range(40)]
  how = {"text_length": 32, "patch_size": 4, "seed": 3, "threads": 0, **options}
  return Pipeline(segments, {"toy": ToySource("toy", 40, captions=captions)}, WordTokenizer(), **how)


FIXED = Segment(9, 8, (("toy", 1),), 8)
PACKED = Segment(9, 8, (("toy", 1),), Resolution("native", max_tokens=9), rows=Rows(2, 20), pack_pairs=4)


@pytest.mark.parametrize("segment", [FIXED, PACKED], ids=["fixed", "packed"])
def test_hosts_share_views_that_lie_where_the_image_does(segment):
  asked = Extras(strong_images=2, strong_texts=3)
  batch = pipeline(segment, extras=ExtrasOptions(asked, strong_augment=Augment())).batch(2)
  # Without any change of the pixels each view is the image itself.
  for view in range(2):
    np.testing.assert_array_equal(batch.strong.patches[:, view], batch.image.patches)
  extras = ExtrasOptions(asked)
  whole = pipeline(segment, extras=extras).batch(2)
  parts = [pipeline(segment, extras=extras, host_index=k, host_count=2).batch(2).strong for k in range(2)]
  # Packed images are no squares, and their views have no places.
  assert (whole.strong.places is None) == (segment is PACKED)
  for field in dataclasses.fields(whole.strong):
    if getattr(whole.strong, field.name) is None:
      continue
    together = np.concatenate([getattr(part, field.name) for part in parts])
    np.testing.assert_array_equal(together, getattr(whole.strong, field.name))
  rows = whole.strong.patches.reshape(-1, whole.strong.patches[0, 0].size)
  assert len(np.unique(rows, axis=0)) > len(rows) // 2
  captions = [[bytes(row[row > 0].astype(np.uint8)).decode() for row in rows] for rows in whole.strong.tokens]
  assert len({caption for row in captions for caption in row}) > 8
  keys = np.ascontiguousarray(whole.strong.keys).view("<u8")[..., 0]
  assert keys.tolist() == [[stable_hash(caption) for caption in row] for row in captions]


def test_options_without_a_use_are_named():
  for options, said in (
    ({"strong_augment": Augment()}, "data.strong_augment has no use: .*strong_views"),
    ({"text_augment": TextAugment(swap=0.1)}, "data.text_augment has no use"),
  ):
    with pytest.raises(UserError, match=said):
      pipeline(FIXED, extras=ExtrasOptions(**options))
