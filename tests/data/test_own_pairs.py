"""Pictures of a person's own: named by a table, with captions beside them, or in folders of classes."""

import csv
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs import common, own_pairs
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from contrastive_jax.evaluation.unreadable import UnreadableSet
from contrastive_jax.preprocess.decoding import DecodeError
from contrastive_jax.training import config as run_config
from contrastive_jax.training import fields, ranges
from data import build, kinds, tasks
from data.sources import Source
from data.sources.folder import open_folder
from data.sources.pictures import in_split
from data.sources.table import TableSource

COUNT = 40


def draw(path, level):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 4), (level, 0, 0)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Pictures whose red is their number."""
  folder = tmp_path_factory.mktemp("photos")
  for number in range(COUNT):
    draw(folder / "images" / f"{number}.png", number)
  return folder


ROWS = [{"image": f"images/{number}.png", "caption": f"photo {number}"} for number in range(COUNT)]


def written(path, rows, columns=None):
  """Writes a table by the library of its format."""
  columns = columns or list(rows[0])
  if path.suffix in (".csv", ".tsv"):
    with open(path, "w", newline="", encoding="utf-8") as file:
      table = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
      table.writeheader()
      table.writerows(rows)
  elif path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  elif path.suffix == ".jsonl":
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  else:
    path.write_text(json.dumps(rows))
  return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_table_of_any_format_gives_each_picture_its_caption(photos, suffix):
  source = pickle.loads(pickle.dumps(TableSource(str(written(photos / f"table{suffix}", ROWS)))))
  assert isinstance(source, Source) and len(source) == COUNT
  for index in range(COUNT):
    example = source[index]
    assert example.text == source.text(index) and example.id == index and example.flip
    assert example.text.captions == (f"photo {example.image[0, 0, 0]}",) and example.image.shape == (4, 6, 3)
  assert len({source.text(index).group for index in range(COUNT)}) == COUNT


def test_a_picture_has_the_captions_of_all_its_rows_and_of_lists(photos):
  rows = [
    {"image": "images/3.png", "caption": ["three", "a trio"]},
    {"image": "images/1.png", "caption": "on the left"},
    {"image": "images/3.png", "caption": "three"},
    {"image": "images/3.png", "caption": "drei"},
  ]
  source = TableSource(str(written(photos / "several.jsonl", rows)))
  assert [source.text(index).captions for index in range(2)] == [("three", "a trio", "drei"), ("on the left",)]
  assert source[0].flip and not source[1].flip


def test_columns_and_the_folder_of_the_pictures_are_named(photos, tmp_path):
  rows = [{"file": f"{number}.png", "title": f"photo {number}"} for number in range(4)]
  table = written(tmp_path / "table.csv", rows)
  named = {"image_key": "file", "caption_key": "title", "root": str(photos / "images")}
  assert TableSource(str(table), **named)[2].image[0, 0, 0] == 2
  config = common.get_config()
  config.data.sources = {"mine": {"name": f"table/{table}", **named}}
  (source,) = kinds.open_sources(config, [f"table/{table}"]).values()
  assert source.text(3).captions == ("photo 3",)
  # A run is scored on it by the columns that it trains on, and so is one that is read from its config.json.
  for given in (config, json.loads(config.to_json())):
    scored = tasks.load(f"table/{table}", hints=kinds.hints(given, f"table/{table}"))
    assert scored.captions == [f"photo {number}" for number in range(4)]
  keys = ":image_key=file:caption_key=title"
  with pytest.raises(UserError, match=r"pictures that were looked for are missing.*root"):
    tasks.load(f"table/{table}{keys}")


def test_drawn_splits_share_no_picture_and_stay_when_rows_are_added(photos):
  table = str(written(photos / "split.csv", ROWS))
  parts = {split: TableSource(f"{table}@{split}") for split in ("train", "test")}
  pictures = {split: [part.text(k).captions[0] for k in range(len(part))] for split, part in parts.items()}
  assert sorted(pictures["train"] + pictures["test"]) == sorted(row["caption"] for row in ROWS)
  assert 1 <= len(pictures["test"]) <= COUNT // 4
  written(photos / "split.csv", [ROWS[5], *ROWS[::-1]] + [{"image": "images/new.png", "caption": "new"}] * 2)
  again = TableSource(f"{table}@test")
  assert {again.text(k).captions[0] for k in range(len(again))} - {"new"} == set(pictures["test"])
  # A tenth of many.
  many = [{"image": f"{number}", "caption": "x"} for number in range(20_000)]
  written(photos / "many.csv", [*ROWS, *many])
  assert sum(in_split("", "test", row["image"]) for row in many) == pytest.approx(2000, abs=4 * 1800**0.5)


def test_a_column_of_splits_is_taken_at_its_word(photos):
  rows = [row | {"split": ("train", "val")[number % 4 == 0]} for number, row in enumerate(ROWS)]
  table = str(written(photos / "told.csv", rows))
  assert [len(TableSource(f"{table}{end}")) for end in ("", "@train", "@val")] == [40, 30, 10]
  with pytest.raises(UserError, match=r"no row of the split 'vall' \(did you mean 'val'\?\)"):
    TableSource(f"{table}@vall")


def test_a_path_with_an_at_sign_is_a_path(photos, tmp_path):
  folder = tmp_path / "me@home"
  draw(folder / "a.png", 1)
  table = written(folder / "t@ble.csv", [{"image": "a.png", "caption": "x"}])
  assert len(TableSource(str(table))) == 1
  assert TableSource(str(table)).split == ""


@pytest.mark.parametrize("splits", [("train", None), (None, "train"), ("train", 3), ("train", ["a"])])
def test_a_column_of_splits_is_whole_or_not_there(photos, splits):
  rows = [row | ({} if split is None else {"split": split}) for row, split in zip(ROWS, splits, strict=False)]
  with pytest.raises(UserError, match=r"row 2 of .* 'split', and row 1 has .*: give each row its split"):
    TableSource(str(written(photos / "partly.jsonl", rows)))


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ([{"path": "images/1.png", "caption": "x"}], "no column 'image'.*or name it with image_key"),
    ([{"image": "images/1.png", "captoin": "x"}], r"no column 'caption' \(did you mean 'captoin'\?\).*caption_key"),
    ([{"image": " ", "caption": "x"}], "row 1 of .* has an empty 'image'"),
    ([{"image": "images/none.png", "caption": "x"}], "1 of 1 pictures .* missing"),
    ([{"image": "https://host/a.png", "caption": "x"}], "https"),
  ],
)
def test_mistakes_are_said_when_a_table_is_opened(photos, rows, said):
  with pytest.raises(UserError, match=said) as raised:
    TableSource(str(written(photos / "wrong.csv", rows)))
  assert "\n" not in str(raised.value)


def test_bad_rows_are_bad_records(photos, tmp_path):
  (photos / "images" / "broken.png").write_bytes(b"no picture")
  rows = [
    *ROWS[:6],
    {"image": "images/broken.png", "caption": "x"},
    {"image": "images/gone.png", "caption": "x"},
    {"image": "images", "caption": "x"},
    {"image": "images/6.png", "caption": None},
    {"image": "images/7.png", "caption": ["", " "]},
    {"image": "images/8.png", "caption": 8},
    {"image": "images/9.png", "caption": "\ud800"},
  ]
  table = str(written(photos / "bad.jsonl", rows))
  source = TableSource(table)
  for index in range(6, len(rows)):
    with pytest.raises(DecodeError):
      source[index]
  assert source.shard_of(6).endswith("broken.png")
  scored = tasks.load(f"table/{table}")
  assert isinstance(scored, PairSet) and len(scored.images) == len(rows)
  for index in range(6, len(rows)):
    with pytest.raises(DecodeError):
      scored.images[index]
  np.testing.assert_array_equal(scored.images[4][..., 0], 4)
  most = str(written(photos / "most.jsonl", rows[5:7] + rows[9:12]))
  with pytest.raises(UnreadableSet, match="3 of 5 records without a caption, the first is number 2"):
    tasks.load(f"table/{most}")


def test_captions_stand_beside_pictures(tmp_path):
  for number, name in enumerate(("a.png", "b.jpg", "sub/c.webp", "d.png", "e.png", "f.png")):
    draw(tmp_path / name, number)
  (tmp_path / "a.txt").write_text("\ufeffa red dot\n\n rot \r\n", encoding="utf-8")
  (tmp_path / "b.json").write_text(json.dumps({"width": 6, "caption": "to the left", "text": "no"}))
  (tmp_path / "sub" / "c.json").write_text(json.dumps(["one", "two"]))
  (tmp_path / "d.json").write_text('{"caption": ')
  (tmp_path / "e.json").write_text(json.dumps({"title": "x"}))
  source = pickle.loads(pickle.dumps(open_folder(str(tmp_path))))
  assert isinstance(source, Source) and len(source) == 6
  names = ["a.png", "b.jpg", "d.png", "e.png", "f.png", "sub/c.webp"]
  assert [source.shard_of(index) for index in range(6)] == [str(tmp_path / name) for name in names]
  assert source.text(0).captions == ("a red dot", "rot") and source.text(5).captions == ("one", "two")
  assert source[0].flip and not source[1].flip
  for index, said in ((2, "cannot be read"), (3, "none of the keys"), (4, r"f\.txt is not beside it")):
    with pytest.raises(DecodeError, match=said):
      source.text(index)
  with pytest.raises(UnreadableSet, match="3 of 6 records without a caption"):
    tasks.load(f"folder/{tmp_path}")
  (tmp_path / "f.txt").write_text("late")
  scored = tasks.load(f"folder/{tmp_path}")
  assert isinstance(scored, PairSet) and scored.captions == [
    "a red dot",
    "rot",
    "to the left",
    "",
    "",
    "late",
    "one",
    "two",
  ]


def test_folders_are_classes(tmp_path):
  for number in range(30):
    draw(tmp_path / ("ice_cream", "dog")[number % 2] / "deep" / f"{number}.png", number)
  source = pickle.loads(pickle.dumps(open_folder(str(tmp_path), templates=("a {}.", "my {}"))))
  assert source.classes == ["dog", "ice cream"]
  for index in range(30):
    example, label = source[index], source.labels[index]
    assert example.image[0, 0, 0] % 2 == 1 - label
    assert example.text.captions == (("a dog.", "my dog"), ("a ice cream.", "my ice cream"))[label]
  assert len({source.text(index).group for index in range(30)}) == 2
  scored = tasks.load(f"folder/{tmp_path}", hints={"templates": ("a {}.", "my {}")})
  assert isinstance(scored, LabelledSet) and list(scored.templates) == ["a {}.", "my {}"]
  np.testing.assert_array_equal(scored.labels, source.labels)
  parts = [tasks.load(f"folder/{tmp_path}@{split}") for split in ("train", "test")]
  assert sum(len(part.images) for part in parts) == 30 and list(parts[1].classes) == source.classes


def test_what_systems_leave_in_folders_is_no_picture_and_no_class(tmp_path):
  for name in ("cat/1.png", "dog/2.png", ".thumbnails/3.png", "__MACOSX/cat/._1.png", "dog/._2.png", "cat/.4.png"):
    draw(tmp_path / name, 1)
  source = open_folder(str(tmp_path))
  assert source.classes == ["cat", "dog"] and len(source) == 2
  (tmp_path / "cat" / "5.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
  source = open_folder(str(tmp_path))
  assert len(source) == 3
  with pytest.raises(DecodeError, match="pip install pillow-heif"):
    source[1]


@pytest.mark.parametrize(
  ("folders", "said"),
  [
    (("train", "Val"), r"holds the splits Val, train and no classes: name one, folder/.*/Val"),
    (("test",), "holds the splits test"),
    (("ice_cream", "ice cream"), "two folders for the class 'ice cream'"),
  ],
)
def test_folders_that_are_no_classes_are_told(tmp_path, folders, said):
  for name in folders:
    draw(tmp_path / name / "cat" / "1.png", 1)
  with pytest.raises(UserError, match=said):
    open_folder(str(tmp_path))


def test_mistakes_are_said_when_a_folder_is_opened(tmp_path):
  with pytest.raises(UserError, match="is no folder"):
    open_folder(str(tmp_path / "none"))
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(UserError, match="holds no picture"):
    open_folder(str(tmp_path))
  (tmp_path / "a.heic").write_bytes(b"x")
  with pytest.raises(UserError, match="pip install pillow-heif"):
    open_folder(str(tmp_path))
  (tmp_path / "a.heic").unlink()
  draw(tmp_path / "dog.png", 1)
  with pytest.raises(UserError, match=r"dog\.png and 0 more pictures have no caption: put dog\.txt beside it"):
    open_folder(str(tmp_path))
  (tmp_path / "dog.png").unlink()
  draw(tmp_path / "dog" / "1.png", 1)
  with pytest.raises(UserError, match="has one class, 'dog'"):
    open_folder(str(tmp_path))
  with pytest.raises(UserError, match="no split 'tset'"):
    open_folder(f"{tmp_path}@tset")


def test_tasks_and_runs_take_them_by_name(photos):
  table = written(photos / "named.csv", ROWS)
  names = [f"table/{table}@test", f"folder/{photos}"]
  assert tasks.expand(names) == names
  with pytest.raises(UserError, match="label_key"):
    tasks.load(f"table/{table}:label_key=x")
  with pytest.raises(UserError, match="names features"):
    tasks.expand([f"folder/{photos}:caption_key=x"])
  config = common.get_config()
  config.data.sources = {"all": {"name": f"table/{table}", "weight": 1.0}}
  with pytest.raises(UserError, match=r"has all of .*train on .*@train"):
    build.evaluation_set(config, f"table/{table}@test")
  config.data.sources = {"all": {"name": f"table/{table}@train", "weight": 1.0}}
  assert build.evaluation_set(config, f"table/{table}@test")().name == f"table/{table}@test"


def test_the_config_for_them_names_what_is_there(photos):
  config = own_pairs.get_config(str(photos))
  assert config.evals == (f"folder/{photos}@test",)
  fields.check_fields(run_config.as_json(config))
  ranges.check_ranges(run_config.as_json(config))
  assert own_pairs.get_config("a.csv").data.sources.own.name == "table/a.csv@train"
  with pytest.raises(UserError, match="behind the config file"):
    own_pairs.get_config()


def test_columns_of_captions_have_weights_and_rows_are_filtered(photos):
  rows = [
    {"image": f"images/{k}.png", "title": f"photo {k}", "alt": "" if k % 3 else f"alt {k}", "score": f"{k / 10:.1f}"}
    for k in range(COUNT)
  ]
  rows[5]["score"] = ""
  source = TableSource(
    str(written(photos / "weights.csv", rows)), caption_key={"title": 1.0, "alt": 3.0}, filter="score >= 0.3"
  )
  kept = [k for k in range(COUNT) if k >= 3 and k != 5]
  assert [source[index].image[0, 0, 0] for index in range(len(source))] == kept
  for index, k in enumerate(kept):
    text = source.text(index)
    assert text.captions == ((f"photo {k}",) if k % 3 else (f"alt {k}", f"photo {k}"))
    assert text.cumulative == (None if k % 3 else (0.75, 1.0))


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"filter": "scoer > 1"}, "did you mean 'score'"),
    ({"filter": "title > 1"}, "compares title with 1, of another type"),
    ({"filter": "score > 100"}, "keeps none of 40 rows"),
    ({"caption_key": {"titel": 1.0}}, "has no column 'titel'.*did you mean 'title'"),
  ],
)
def test_filters_and_weights_that_cannot_be_are_named(photos, options, said):
  rows = [{"image": f"images/{k}.png", "title": f"photo {k}", "score": k} for k in range(COUNT)]
  with pytest.raises(UserError, match=said):
    TableSource(str(written(photos / "filters.jsonl", rows)), **{"caption_key": "title"} | options)


@pytest.mark.parametrize("value", [{"a": 0.0}, {"a": "b"}, {}, "", 3, {"a": float("inf")}])
def test_weights_of_columns_are_numbers_above_zero(value):
  config = common.get_config()
  config.data.sources = {"own": {"name": "table/x.csv", "weight": 1.0, "caption_key": value}}
  with pytest.raises(UserError, match="caption_key"):
    kinds.open_sources(config, ["table/x.csv"])
