"""Weights and wrong captions of pairs: from the columns of a set to the batch."""

import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Segment
from data.extras import ExtrasOptions
from data.hard_captions import DRAWS_EACH, chosen, swapped
from data.pipeline import Pipeline
from data.sources import Text
from data.sources.indexed import IndexedSource
from data.sources.table import TableSource
from tests.data.in_shards import build
from tests.data.toy import ToySource, WordTokenizer

COUNT, LENGTH = 12, 40


def row(number):
  wrong = [f"no {k} of {number}" for k in range(number % 3)]
  return {"caption": f"photo {number}", "quality": number / 8, "wrong": [*wrong, f"photo {number}"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Pictures with a table, whose wrong captions hold the right one as well, by mistake."""
  folder = tmp_path_factory.mktemp("photos")
  for number in range(COUNT):
    Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
  rows = [{"image": f"{number}.png", **row(number)} for number in range(COUNT)]
  (folder / "captions.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
  return folder


@pytest.fixture(scope="module")
def tars(photos, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tars")
  with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=5, verbose=0) as writer:
    for number in range(COUNT):
      picture = (photos / f"{number}.png").read_bytes()
      writer.write({"__key__": f"{number:03d}", "png": picture, "json": row(number)})
  build("webdataset", f"{folder}/*.tar", texts=("caption", "wrong"), columns=("quality",))
  return f"{folder}/*.tar"


KEYS = {"weight_key": "quality", "wrong_caption_key": "wrong"}


def pipeline(source, **options):
  segment = Segment(100, 8, ((source.name, 1),), 8)
  how = {"text_length": LENGTH, "patch_size": 4, "seed": 3, "threads": 0, **options}
  return Pipeline([segment], {source.name: source}, WordTokenizer(), **how)


def read(tokens):
  return bytes(tokens[tokens > 0].astype(np.uint8)).decode()


@pytest.mark.parametrize("kind", ["table", "webdataset"])
def test_a_batch_has_the_weights_and_wrong_captions_of_its_samples(photos, tars, kind):
  source = TableSource(f"{photos}/captions.jsonl", **KEYS) if kind == "table" else IndexedSource(kind, tars, **KEYS)
  assert source.text(5).captions == ("photo 5",) and source.text(5).weight == 5 / 8
  met = set()
  for step in range(12):
    batch = pipeline(source, extras=ExtrasOptions(Extras(weights=True, hard_captions=2))).batch(step)
    for pair in range(8):
      number = int(read(batch.text.tokens[pair]).removeprefix("photo "))
      hard = batch.hard_captions
      assert batch.weights[pair] == number / 8
      some = [read(hard.tokens[pair, k]) for k in np.flatnonzero(hard.there[pair])]
      assert sorted(some) == sorted(row(number)["wrong"][:-1])[:2]
      met.add(tuple(some))
  assert {("no 0 of 2", "no 1 of 2"), ("no 1 of 2", "no 0 of 2")} <= met  # Their order is drawn.


def test_a_set_with_classes_has_them_too(photos, tmp_path):
  (tmp_path / "names.txt").write_text("cat\ndog\n")
  with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", verbose=0) as writer:
    said = {"quality": 0.25, "wrong": ["a photo of a fish"]}
    writer.write({"__key__": "a", "png": (photos / "0.png").read_bytes(), "cls": "1", "json": said})
  build("webdataset", f"{tmp_path}/*.tar", texts=("cls", "wrong"), columns=("quality",))
  source = IndexedSource("webdataset", f"{tmp_path}/*.tar", classes=str(tmp_path / "names.txt"), **KEYS)
  text = source.text(0)
  assert all("dog" in caption for caption in text.captions) and text.weight == 0.25
  assert text.wrong == ("a photo of a fish",)


def test_hosts_share_the_wrong_captions_of_a_batch(photos):
  source = TableSource(f"{photos}/captions.jsonl", wrong_caption_key="wrong")
  options = {"extras": ExtrasOptions(Extras(hard_captions=2), swap_words=True)}
  whole = pipeline(source, **options).batch(4).hard_captions
  parts = [pipeline(source, **options, host_index=k, host_count=2).batch(4).hard_captions for k in range(2)]
  for field in ("tokens", "mask", "there"):
    np.testing.assert_array_equal(getattr(whole, field), np.concatenate([getattr(part, field) for part in parts]))


def test_words_are_exchanged_where_a_sample_has_no_wrong_caption(rng):
  draws = rng.random((200, 2 * DRAWS_EACH))
  text = Text(("a red dog", "one"), 0, wrong=("a blue dog", "one"))
  made = [chosen(text, "a red dog", 2, True, list(row)) for row in draws]
  assert {first for first, _ in made} == {"a blue dog"}
  assert {second for _, second in made} == {"red a dog", "dog red a", "a dog red"}
  assert chosen(Text(("one",), 0), "one", 2, True, [0.3] * 6) == [None, None]
  # With two captions that are both right, an exchange that makes the other one is none.
  assert chosen(Text(("a b", "b a"), 0), "a b", 1, True, [0.0, 0.3, 0.3]) == [None]
  assert swapped("The the THE", 0.1, 0.9) is None


@pytest.mark.parametrize("value", ["", None, "much", -1, True, float("nan")])
def test_what_is_no_weight_is_a_bad_record(tmp_path, value):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  table = tmp_path / "t.json"
  table.write_text(json.dumps([{"image": "a.png", "caption": "a", "quality": value}]))
  with pytest.raises(DecodeError, match=r"its quality .* is no weight"):
    TableSource(str(table), weight_key="quality")[0]


def test_rows_of_a_picture_agree_in_its_weight_and_join_their_wrong_captions(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  table, rows = tmp_path / "t.json", [{"image": "a.png", "caption": k, "w": 0.5, "no": f"not {k}"} for k in "ab"]
  table.write_text(json.dumps(rows))
  text = TableSource(str(table), weight_key="w", wrong_caption_key="no").text(0)
  assert text.captions == ("a", "b") and text.weight == 0.5 and text.wrong == ("not a", "not b")
  rows[1]["w"] = 1
  table.write_text(json.dumps(rows))
  with pytest.raises(DecodeError, match=r"its rows have the weights 0\.5, 1\.0"):
    TableSource(str(table), weight_key="w")[0]


def test_columns_without_a_use_and_uses_without_a_column_are_named(photos, tars):
  table = f"{photos}/captions.jsonl"
  for source, extras, said in (
    (TableSource(table, weight_key="quality"), ExtrasOptions(), "weight_key .* has no use: .*pair_weights=True"),
    (TableSource(table, wrong_caption_key="wrong"), ExtrasOptions(), "wrong_caption_key .* has no use"),
    (ToySource("toy", 9), ExtrasOptions(Extras(weights=True)), "finds no source with a weight_key"),
    (
      ToySource("toy", 9),
      ExtrasOptions(Extras(hard_captions=1)),
      "finds no source with a wrong_caption_key.*swap_words=True",
    ),
    (ToySource("toy", 9), ExtrasOptions(swap_words=True), "swap_words=True has no use"),
  ):
    with pytest.raises(UserError, match=said):
      pipeline(source, extras=extras)
  with pytest.raises(UserError, match=r"no column 'qualty' .*'quality'.*that of the weights with weight_key"):
    TableSource(table, weight_key="qualty")
  with pytest.raises(UserError, match=r"no captions in 'worng'.*--texts=worng"):
    IndexedSource("webdataset", tars, wrong_caption_key="worng")


@pytest.mark.parametrize(("replay", "marked"), [(("b",), "b"), ((), "ab"), (None, None)])
def test_pairs_of_replayed_sources_are_marked(replay, marked):
  segment = Segment(2, 12, (("a", 2), ("b", 1)), 8)
  how = {"text_length": LENGTH, "patch_size": 4, "seed": 3, "threads": 0}
  sources = {name: ToySource(name, 9) for name in "ab"}
  batch = Pipeline([segment], sources, WordTokenizer(), **how, extras=ExtrasOptions(Extras(replayed=replay))).batch(1)
  names = np.where(batch.ids < 1 << 40, "a", "b")
  assert set(names) == {"a", "b"}
  expected = None if marked is None else np.isin(names, list(marked)).tolist()
  assert expected == (None if batch.replayed is None else batch.replayed.tolist())
