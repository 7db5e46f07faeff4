"""Several captions of an image in a step, and captions that are longer than the text tower reads."""

from collections import Counter

import jax
import numpy as np
import pytest
from toy import WordTokenizer

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.long_captions import fitted, sentences
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Segment, cursors
from data.extras import ExtrasOptions
from data.pipeline import Pipeline
from data.sources import Example, Text


class Captioned:
  """Grey pictures whose level is their number, with as many captions as said; what is read is counted."""

  def __init__(self, length=20, captions=4, cumulative=None):
    self.name, self.length, self.captions, self.cumulative, self.reads = "a", length, captions, cumulative, Counter()

  def __len__(self):
    return self.length

  def text(self, index):
    return Text(tuple(f"p{index} c{k}" for k in range(self.captions)), index, self.cumulative)

  def __getitem__(self, index):
    self.reads[index] += 1
    return Example(np.full((8, 8, 3), index, np.uint8), self.text(index), index)


def captions_of(pipeline, step):
  seen, choose = [], pipeline._captions

  def noted(*arguments):
    seen.extend(found := choose(*arguments))
    return found

  pipeline._captions = noted
  return pipeline.batch(step), seen


def tokenize(tokenizer, captions, length):
  return tokenizer(captions, length)


def make(source, per_image=2, batch_size=12, **options):
  segments = (Segment(5, batch_size, (("a", 1),), 8, captions_per_image=per_image), Segment(3, 6, (("a", 1),), 8))
  options = {"text_length": 4, "patch_size": 4, "seed": 1, "threads": 0} | options
  return Pipeline(segments, {"a": source}, WordTokenizer(), **options)


@pytest.mark.parametrize("per_image", [2, 3, 6])
def test_rows_of_an_image_have_captions_of_their_own_and_count_for_one_another(per_image):
  for step in range(5):
    batch, captions = captions_of(make(Captioned(captions=6), per_image), step)
    images = batch.ids.reshape(-1, per_image)
    assert (images == images[:, :1]).all() and len(set(images[:, 0])) == 12 // per_image
    assert [caption.split()[0] for caption in captions] == [f"p{number}" for number in batch.ids]
    assert all(len(set(row)) == per_image for row in np.reshape(captions, (-1, per_image)).tolist())
    same_group = (batch.keys[:, None, 0] == batch.keys[None, :, 0]).all(-1)
    np.testing.assert_array_equal(same_group, batch.ids[:, None] == batch.ids[None, :])


def test_an_epoch_shows_every_image_once_whatever_the_captions():
  run = make(Captioned(length=15))
  ids = np.concatenate([run.batch(step).ids for step in range(8)])
  first = ids[: 5 * 12 : 2]  # 30 images are two epochs of 15, and then come the single ones.
  assert [Counter(first[:15].tolist()), Counter(first[15:].tolist())] == [Counter(range(15))] * 2
  assert Counter(ids[60:75].tolist()) == Counter(range(15))
  assert cursors(run.segments, 1) == {"a": 30}


def test_an_image_is_read_once_for_its_rows():
  source = Captioned()
  batch = make(source, per_image=4).batch(0)
  assert source.reads == Counter(batch.ids[::4].tolist())


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_the_rows_of_an_image_as_one_host_has_them(hosts):
  whole = make(Captioned(), per_image=3)
  parts = [make(Captioned(), per_image=3, host_index=host, host_count=hosts) for host in range(hosts)]
  for step in (0, 4):
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch(step) for part in parts))
    jax.tree.map(np.testing.assert_array_equal, together, whole.batch(step))


def test_others_are_drawn_by_their_weights_and_none_twice_before_all():
  text = Text(("a", "b", "c"), 0, (0.5, 0.8, 1.0))
  rng = np.random.default_rng(0)
  draws = rng.random((20_000, 4)).tolist()
  drawn = [text.choose_others(row) for row in draws]
  assert all(row[0] == text.choose(draw[0]) for row, draw in zip(drawn, draws, strict=True))
  assert all(len(set(row[:3])) == 3 for row in drawn)
  pairs = Counter((row[0], row[1]) for row in drawn)
  shares = {"a": 0.5, "b": 0.3, "c": 0.2}
  for (first, second), count in pairs.items():
    expected = shares[first] * shares[second] / (1 - shares[first])
    assert abs(count / len(drawn) - expected) < 4 * np.sqrt(expected / len(drawn))
  fourth = Counter(row[3] for row in drawn)
  assert abs(fourth["a"] / len(drawn) - 0.5) < 0.02


def test_what_cannot_be_is_refused():
  with pytest.raises(UserError, match=r"batch_size=10 is not a multiple of data.captions_per_image=3"):
    Segment(1, 10, (("a", 1),), 8, captions_per_image=3)
  with pytest.raises(UserError, match=r"data.captions_per_image=2 shows a sample several times in a step"):
    make(Captioned(), extras=ExtrasOptions(Extras(state_rows=True)))


@pytest.mark.parametrize(
  ("caption", "parts"),
  [
    ("one", ["one"]),
    ("A dog. It runs!", ["A dog.", "It runs!"]),
    ("At 3.5 m, e.g.this", ["At 3.5 m, e.g.this"]),
    ('He said "go." Then left.', ['He said "go."', "Then left."]),
    ("狗在跑。它是棕色的！", ["狗在跑。", "它是棕色的！"]),
    ("line one\nline two", ["line one", "line two"]),
    ("...", ["..."]),
  ],
)
def test_sentences(caption, parts):
  found = sentences(caption)
  assert "".join("".join(found).split()) == "".join(caption.split())
  assert found == parts


LONG = "a b c d. e f. g h i j k l m."


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ("truncate", {LONG: 1.0}),
    ("sentence", {"a b c d.": 1 / 3, "e f.": 1 / 3, "g h i j k l m.": 1 / 3}),
    ("span", {LONG: 1 / 3, "e f. g h i j k l m.": 1 / 3, "g h i j k l m.": 1 / 3}),
  ],
)
def test_a_part_of_a_long_caption_is_drawn_with_equal_chances(how, expected):
  draws = [(k + 0.5) / 300 for k in range(300)]
  found = Counter(fitted([LONG] * 300, draws, how, WordTokenizer(), 6, tokenize))
  assert {part: count / 300 for part, count in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("how", ["sentence", "span"])
def test_a_caption_that_fits_is_read_whole(how):
  words = WordTokenizer()
  needed = int(words(["x y. z."], 50)[1].sum())
  assert fitted(["x y. z."], [0.9], how, words, needed, tokenize) == ["x y. z."]
  assert fitted(["x y. z."], [0.9], how, words, needed - 1, tokenize) == ["z."]
