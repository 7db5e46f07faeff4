"""Indices of sets in shards, and tars: what they say, against the files as webdataset wrote and reads them."""

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from data import indexing, kinds, tasks
from data.files import Files
from data.joins import Join
from data.sources import Source, index
from data.sources.indexed import IndexedSource, files_of, index_folder
from tests.data import in_shards
from tests.data.in_shards import A_SHARD, COUNT, build, pixels, png

shards = in_shards.shards


@pytest.fixture
def name(shards):
  return f"{shards}/{{000..003}}.tar"


def test_every_sample_is_as_webdatasets_own_reader_gives_it(shards, name):
  source = pickle.loads(pickle.dumps(IndexedSource("webdataset", name)))
  assert isinstance(source, Source) and len(source) == COUNT
  files = [f"{shards}/{number:03d}.tar" for number in range(4)]
  theirs = list(webdataset.WebDataset(files, shardshuffle=False).decode("rgb8"))
  assert len(theirs) == COUNT
  for k, sample in enumerate(theirs):
    example = source[k]
    np.testing.assert_array_equal(example.image, sample["png"])
    assert example.text.captions == (sample["txt"].strip(),) and example.id == k and example.text == source.text(k)
    assert source.shard_of(k) == sample["__url__"]
  assert len({source.text(k).group for k in range(COUNT)}) == COUNT


def test_fields_are_drawn_by_their_weights(name):
  text = IndexedSource("webdataset", name, caption_key={"txt": 1.0, "caption": 3.0}).text(7)
  assert text.captions == ("it says 7", "also 7", "picture 7")
  drawn = [text.choose((k + 0.5) / 800) for k in range(800)]
  assert [drawn.count(caption) for caption in text.captions] == [300, 300, 200]
  # A config that was stored may list them in another order.
  assert IndexedSource("webdataset", name, caption_key={"caption": 3.0, "txt": 1.0}).text(7) == text


@pytest.mark.parametrize(
  ("text", "keeps"),
  [
    ("similarity > 0.5", lambda k: k / COUNT > 0.5),
    ("similarity >= 0.5 and not nsfw == True", lambda k: k / COUNT >= 0.5 and k % 2),
    ("height < 10 or similarity == 0.9", lambda k: k + 4 < 10 or k / COUNT == 0.9),
    ("0.1 < similarity <= 0.3", lambda k: 0.1 < k / COUNT <= 0.3),
    ("height != 11 and width == 6", lambda k: k + 4 != 11),
  ],
)
def test_a_filter_keeps_what_python_would(name, text, keeps):
  source = IndexedSource("webdataset", name, filter=text)
  assert [source.text(k).captions[0] for k in range(len(source))] == [f"picture {k}" for k in range(COUNT) if keeps(k)]
  assert [source[k].id for k in range(len(source))] == list(range(len(source)))


def test_the_splits_part_the_set_and_stay_when_shards_are_added(shards, tmp_path):
  for file in shards.glob("00[0-2].tar"):
    shutil.copy(file, tmp_path)
  texts = {}
  for count in (2, 3):
    named = f"{tmp_path}/{{000..00{count - 1}}}.tar"
    build("webdataset", named)
    parts = {split: IndexedSource("webdataset", f"{named}@{split}") for split in ("train", "test")}
    texts[count] = {split: {part.text(k).captions for k in range(len(part))} for split, part in parts.items()}
    assert len(texts[count]["train"] | texts[count]["test"]) == count * A_SHARD
    assert not texts[count]["train"] & texts[count]["test"]
  assert texts[2]["test"] <= texts[3]["test"] and texts[2]["train"] <= texts[3]["train"]


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"filter": "similarty > 1"}, "did you mean 'similarity'"),
    ({"filter": "similarity >"}, "cannot be read"),
    ({"filter": "similarity > 'a'"}, "of another type"),
    ({"filter": "similarity > 1"}, "keeps none of 40 samples"),
    ({"filter": "1 < 2"}, "names no column"),
    ({"filter": "similarity + 1 > 2"}, "cannot be read"),
    ({"caption_key": "text"}, r"no captions in 'text' \(did you mean 'txt'"),
    ({"index": "nowhere"}, "holds no index: build it with python -m data.index"),
  ],
)
def test_mistakes_are_named(name, options, said):
  with pytest.raises(UserError, match=said):
    IndexedSource("webdataset", name, **options)


def test_options_of_an_entry_reach_the_source_and_the_evaluation(name):
  config = common.get_config()
  entry = {"name": f"webdataset/{name}", "weight": 1.0, "filter": "similarity < 0.5", "caption_key": {"caption": 1.0}}
  config.data.sources = {"mine": entry}
  source = kinds.open_sources(config, [entry["name"]])[entry["name"]]
  assert len(source) == 20 and source.text(3).captions == ("it says 3", "also 3")
  scored = tasks.load(f"webdataset/{name}", hints=kinds.hints(config, f"webdataset/{name}"))
  assert len(scored.images) == 20 and scored.captions[6:8] == ["it says 3", "also 3"]
  np.testing.assert_array_equal(scored.images[3], pixels(3))
  # The feature that a config names for tables and TFDS sets is no field of an index.
  config.data.sources = {"mine": {"name": f"webdataset/{name}@train", "weight": 1.0}}
  config.data.caption_key = "title"
  scored = tasks.load(f"webdataset/{name}@test", hints=kinds.hints(config, f"webdataset/{name}@test"))
  assert set(scored.captions) <= {f"picture {k}" for k in range(40)}


def copied(shards, tmp_path):
  for file in shards.glob("*.tar"):
    shutil.copy(file, tmp_path)
  return f"{tmp_path}/{{000..003}}.tar"


def test_a_file_that_changed_or_went_or_came_is_named(shards, tmp_path):
  named = copied(shards, tmp_path)
  build("webdataset", named)
  victim = tmp_path / "002.tar"
  whole = victim.read_bytes()
  victim.write_bytes(whole + bytes(10240))
  with pytest.raises(UserError, match=r"002.tar has .* bytes, and had .* when it was indexed"):
    IndexedSource("webdataset", named)
  for start in range(512, len(whole), 512):  # Every picture of the file is another.
    whole = whole[:start] + bytes(1) + whole[start + 1 :] if whole[start : start + 4] == b"\x89PNG" else whole
  victim.write_bytes(whole)
  with pytest.raises(UserError, match=r"of .*002.tar at .* are not those that were indexed: build the index anew"):
    IndexedSource("webdataset", named)
  victim.unlink()
  with pytest.raises(UserError, match=r"002.tar"):
    IndexedSource("webdataset", named)
  shutil.copy(shards / "002.tar", victim)
  shutil.copy(shards / "002.tar", tmp_path / "004.tar")
  build("webdataset", f"{tmp_path}/*.tar", output=tmp_path / "all.index")
  (tmp_path / "004.tar").rename(tmp_path / "005.tar")
  with pytest.raises(UserError, match=r"does not know 1 files, such as .*005.tar"):
    IndexedSource("webdataset", f"{tmp_path}/*.tar", index=str(tmp_path / "all.index"))


def test_a_damaged_picture_is_a_bad_record_and_a_damaged_index_ends_the_run(shards, tmp_path):
  named = copied(shards, tmp_path)
  built = build("webdataset", named)
  source = IndexedSource("webdataset", named)
  place = source._index.value("offset", 3)
  with open(tmp_path / "000.tar", "r+b") as file:
    file.seek(place + 40)
    file.write(b"\xff")
  with pytest.raises(DecodeError, match=r"000.tar at .* are not those that were indexed"):
    source[3]
  np.testing.assert_array_equal(source[4].image, pixels(4))
  (part,) = built.folder.glob("part-*.arrow")
  whole = part.read_bytes()
  for at in range(0, len(whole), max(1, len(whole) // 20)):
    part.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(UserError, match="is damaged, a part of an index"):
      IndexedSource("webdataset", named).text(0)


def tar_of(path, *members):
  with tarfile.open(path, "w") as archive:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def test_what_a_tar_may_hold_beside_whole_samples(tmp_path):
  long_name = "x" * 120
  tar_of(
    tmp_path / "a.tar",
    ("readme", b"no end"),
    ("in/a.PNG", png(1)), ("in/a.txt", b"\xef\xbb\xbfone"),
    ("in/._a.png", b"a Mac's"),
    ("b.txt", b"no picture"),
    ("c.png", b"no picture either"), ("c.txt", b"three"),
    ("d.png", png(4)), ("d.txt", b"\xff\xfe"),
    ("e.png", png(5)), ("e.json", b"[1]"),
    ("f.png", png(6)), ("f.png", png(6)), ("f.txt", b"six"),
    (f"{long_name}.webp", png(7)), (f"{long_name}.txt", "sieben \u00fc".encode()),
    ("h.png", png(8)),
  )  # fmt: skip
  built = build("webdataset", tmp_path / "a.tar")
  assert built.left_out == {
    "no picture": 1,
    "bytes that are no picture which can be decoded here": 1,
    "a txt that is not UTF-8": 1,
    "a json that is no object": 1,
    "two files of one name": 1,
  }
  source = IndexedSource("webdataset", str(tmp_path / "a.tar"))
  assert [source._index.value("key", k) for k in range(len(source))] == ["in/a", long_name, "h"]
  assert source.text(0).captions == ("one",) and source.text(1).captions == ("sieben \u00fc",)
  with pytest.raises(DecodeError, match="no caption in txt"):
    source.text(2)


def damaged_tars():
  whole = io.BytesIO()
  with tarfile.open(fileobj=whole, mode="w") as archive:
    for k in range(5):
      for end, data in (("png", png(k)), ("txt", b"said")):
        info = tarfile.TarInfo(f"{k}.{end}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
  data = whole.getvalue()
  end = len(data.rstrip(b"\0")) // 512 * 512 + 512
  return [
    ("cut within '", data[:540]),
    ("the mark of its end is missing", data[:end]),
    ("damaged at byte 1,024", data[:1030] + b"\xff" + data[1031:]),
    ("more follows the mark of its end", data + data),
    ("no tar and packed", b"\x1f\x8b" + data),
    ("no tar", b"hello" * 300),
    ("no tar", b""),
  ]


@pytest.mark.parametrize(("said", "data"), damaged_tars())
def test_a_damaged_tar_is_refused_by_name_or_left_out(tmp_path, said, data):
  tar_of(tmp_path / "good.tar", ("a.png", png(1)), ("a.txt", b"one"))
  (tmp_path / "bad.tar").write_bytes(data)
  with pytest.raises(UserError, match=rf"bad.tar cannot be indexed, it .*{said}|bad.tar cannot be indexed, .*{said}"):
    build("webdataset", tmp_path)
  build("webdataset", tmp_path, skip_damaged=True)
  assert len(IndexedSource("webdataset", str(tmp_path))) == 1


def test_no_bit_of_a_header_changes_a_tar_unnoticed(tmp_path):
  """A flip in a header is refused, or is in a byte that Python's tarfile itself takes for nothing."""
  tar_of(
    tmp_path / "a.tar",
    *((f"{k}.{end}", png(k) if end == "png" else b"said") for k in range(3) for end in ("png", "txt")),
  )
  whole = (tmp_path / "a.tar").read_bytes()
  build("webdataset", tmp_path / "a.tar")
  before = [IndexedSource("webdataset", str(tmp_path / "a.tar"))[k].text.captions for k in range(3)]
  with tarfile.open(tmp_path / "a.tar") as archive:
    headers = [member.offset for member in archive]
  rng = np.random.default_rng(0)
  for at in rng.choice([header + k for header in headers for k in range(512)], 60, replace=False):
    (tmp_path / "a.tar").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
    with pytest.raises(UserError):
      build("webdataset", tmp_path / "a.tar")
  (tmp_path / "a.tar").write_bytes(whole)
  build("webdataset", tmp_path / "a.tar")
  assert [IndexedSource("webdataset", str(tmp_path / "a.tar"))[k].text.captions for k in range(3)] == before


def test_an_interrupted_build_goes_on_with_the_files_that_are_left(shards, tmp_path, monkeypatch):
  named = copied(shards, tmp_path)
  scanned = []
  scan = indexing.scan_file

  def counted(file, wanted):
    scanned.append(os.path.basename(file))
    if len(scanned) == 3:
      raise KeyboardInterrupt
    return scan(file, wanted)

  monkeypatch.setattr(indexing, "scan_file", counted)
  with pytest.raises(KeyboardInterrupt):
    wanted = indexing.Wanted("webdataset", texts=("txt",))
    folder = Path(index_folder(named))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
      indexing.build(wanted, files_of("webdataset", named, Files()), folder, executor)
  monkeypatch.setattr(indexing, "scan_file", scan)
  os.utime(tmp_path / "000.tar", (time.time(), 1.0))  # It may have changed.
  assert build("webdataset", named, texts=("txt",)).rows == COUNT
  fresh = build("webdataset", named, texts=("txt",), output=tmp_path / "fresh")
  tables = [pa.ipc.open_file(next(folder.glob("part-*"))).read_all() for folder in (folder, fresh.folder)]
  assert tables[0].equals(tables[1]) and not (folder / "pieces").exists()


def test_parts_and_batches_of_any_size_hold_the_same_rows(shards, tmp_path, monkeypatch):
  monkeypatch.setattr(index, "PART_ROWS", 7)
  monkeypatch.setattr(index, "_BATCH_ROWS", 3)
  named = copied(shards, tmp_path)
  built = build("webdataset", named, columns=("similarity",))
  assert len(list(built.folder.glob("part-*"))) == -(-COUNT // 7)
  source = IndexedSource("webdataset", named)
  for k in range(COUNT):
    np.testing.assert_array_equal(source[k].image, pixels(k))
    assert source.text(k).captions == (f"picture {k}",)
  assert len(IndexedSource("webdataset", named, filter="similarity >= 0.5")) == COUNT // 2


def test_columns_of_two_types_and_fields_that_are_nowhere_are_named(tmp_path):
  for number, value in enumerate(("1", '"a"')):
    tar_of(tmp_path / f"{number}.tar", ("a.png", png(1)), ("a.json", f'{{"x": {value}, "caption": "one"}}'.encode()))
  with pytest.raises(UserError, match=r"'x' is int64 in .*0.tar and large_string in .*1.tar"):
    build("webdataset", tmp_path, columns=("x",))
  with pytest.raises(UserError, match="no sample has the column 'y'"):
    build("webdataset", tmp_path, columns=("y",))
  with pytest.raises(UserError, match="no sample has a caption in txt: name its field with --texts"):
    build("webdataset", tmp_path, texts=("txt",))


def test_an_index_tells_what_it_left_out(tmp_path):
  tar_of(tmp_path / "a.tar", ("a.png", png(1)), ("a.txt", b"one"), ("b.txt", b"no picture"))
  built = build("webdataset", tmp_path / "a.tar")
  (file,) = json.loads((built.folder / "index.json").read_text())["files"]
  assert file["left_out"] == {"no picture": 1}


def test_only_new_and_changed_files_are_read_again(shards, tmp_path, monkeypatch):
  for file in ("000.tar", "001.tar"):
    shutil.copy(shards / file, tmp_path)
  build("webdataset", tmp_path, columns=("similarity",))
  shutil.copy(shards / "002.tar", tmp_path)
  shutil.copy(shards / "003.tar", tmp_path / "001.tar")
  scanned, scan = [], indexing.scan_file
  monkeypatch.setattr(indexing, "scan_file", lambda file, wanted: scanned.append(Path(file).name) or scan(file, wanted))
  built = build("webdataset", tmp_path, columns=("similarity",))
  assert sorted(scanned) == ["001.tar", "002.tar"]
  fresh = build("webdataset", tmp_path, columns=("similarity",), output=tmp_path / "fresh")
  tables = [pa.ipc.open_file(next(each.folder.glob("part-*"))).read_all() for each in (built, fresh)]
  assert tables[0].equals(tables[1]) and tables[0]["key"].to_pylist() == [
    f"{k:05d}" for k in (*range(12), *range(36, 40), *range(24, 36))
  ]
  assert len(list(built.folder.glob("part-*"))) == 1
  build("webdataset", tmp_path)  # Another request reads all of them.
  assert len(scanned) == 2 + 3 + 3


def test_captions_of_another_table_join_without_reading_the_files_again(shards, tmp_path, monkeypatch):
  named = copied(shards, tmp_path)
  build("webdataset", named)
  rows = [{"key": f"{k:05d}", "better": [f"better {k}"] if k % 4 else [], "worse": f"worse {k}"} for k in range(5, 60)]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "recaptions.parquet")
  monkeypatch.setattr(indexing, "scan_file", lambda file, wanted: pytest.fail(f"{file} was read"))
  joins = [Join(tmp_path / "recaptions.parquet")]
  built = build("webdataset", named, joins=joins)
  assert built.joined == [COUNT - 5 - 8]  # As many as have a "better" one.
  source = IndexedSource("webdataset", named, caption_key={"better": 2.0, "txt": 1.0})
  for k in range(COUNT):
    better = (f"better {k}",) if k >= 5 and k % 4 else ()
    assert source.text(k).captions == (*better, f"picture {k}")
  assert IndexedSource("webdataset", named).text(7).captions == ("picture 7",)


@pytest.mark.parametrize(
  ("rows", "options", "said"),
  [
    ([{"key": "x", "better": "a"}], {}, "no key of .*recaptions.jsonl is one of the set, which has '00000'"),
    ([{"key": "00001", "better": "a"}] * 2, {}, "key '00001' occurs more than once in .*recaptions.jsonl"),
    ([{"key": "00001", "txt": "a"}], {}, "has a column 'txt' already"),
    ([{"key": "00001", "better": 3}], {}, "row 1 of .*recaptions.jsonl: a caption is no text"),
    ([{"kee": "00001", "better": "a"}], {}, "has no 'key' .*did you mean 'kee'.* or name it with --join_key"),
    ([{"url": "a", "better": "a"}], {"key": "url"}, "the index has no column of texts 'url' to join by"),
  ],
)
def test_joins_that_are_not_clear_are_refused(shards, tmp_path, rows, options, said):
  (tmp_path / "recaptions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  with pytest.raises(UserError, match=said):
    joins = [Join(tmp_path / "recaptions.jsonl", **options)]
    build("webdataset", f"{shards}/000.tar", output=tmp_path / "index", joins=joins)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
  """A tar whose samples have the number of a class, in webdataset's way; the last has one that is none."""
  folder = tmp_path_factory.mktemp("classified")
  with webdataset.TarWriter(f"{folder}/a.tar") as writer:
    for k in range(9):
      writer.write({"__key__": f"{k}", "png": png(k), "cls": k % 3 if k < 8 else 7, "json": {"product": f"p{k // 2}"}})
  (folder / "names.txt").write_text("cat\ndog\nsea lion\n")
  build("webdataset", folder / "a.tar", columns=("product",))
  return folder


def test_numbers_of_classes_become_their_names(classified):
  options = {"classes": str(classified / "names.txt"), "templates": ("a {}", "the {}")}
  source = IndexedSource("webdataset", f"{classified}/a.tar", **options)
  names = ["cat", "dog", "sea lion"]
  for k in range(8):
    assert source.text(k).captions == (f"a {names[k % 3]}", f"the {names[k % 3]}")
    assert [source.text(k).group == source.text(j).group for j in range(8)] == [k % 3 == j % 3 for j in range(8)]
  with pytest.raises(DecodeError, match="its class '7' is none of 3, counted from 0"):
    source.text(8)
  scored = tasks.load(f"webdataset/{classified}/a.tar", hints=options)
  assert scored.classes == names and scored.labels[:8].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
  with pytest.raises(DecodeError):
    scored.images[8]


def test_numbers_of_classes_are_never_taken_for_captions(classified):
  with pytest.raises(UserError, match="'cls' holds numbers of classes: name the file of their names with classes"):
    IndexedSource("webdataset", f"{classified}/a.tar")
  (classified / "twice.txt").write_text("cat\ncat\n")
  with pytest.raises(UserError, match="name of a class in every line, each once"):
    IndexedSource("webdataset", f"{classified}/a.tar", classes=str(classified / "twice.txt"))


def test_a_column_of_groups_has_to_be_there(classified):
  with pytest.raises(UserError, match=r"no column 'produkt' \(did you mean 'product'.*--columns=produkt"):
    names = str(classified / "names.txt")
    IndexedSource("webdataset", f"{classified}/a.tar", classes=names, group_key="produkt")


def test_samples_of_a_group_share_it(tmp_path):
  with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
    for k in range(6):
      product = {"product": f"p{k // 2}"} if k < 4 else {}
      writer.write({"__key__": f"{k}", "png": png(k), "txt": f"picture {k}", "json": product})
  build("webdataset", tmp_path / "a.tar", columns=("product",))
  source = IndexedSource("webdataset", f"{tmp_path}/a.tar", group_key="product")
  groups = [source.text(k).group for k in range(6)]
  assert [groups.index(group) for group in groups] == [0, 0, 2, 2, 4, 5]
