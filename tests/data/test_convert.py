"""Sets as tars: what webdataset's own reader finds in them, and what is the same whatever ran in what order."""

import concurrent.futures
import csv
import io
import json
import random
import resource
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from tensorboardX.record_writer import RecordWriter

from contrastive_jax.errors import UserError
from data import converting, indexing
from data.sources.folder import open_folder
from data.sources.formats import FORMATS
from data.sources.indexed import IndexedSource, index_folder
from data.sources.table import TableSource
from tests.data.in_shards import Here, example

COUNT = 30
# Kinds of files, by the number of the picture.
ENDS = [("jpg", "JPEG", "RGB"), ("png", "PNG", "RGBA"), ("webp", "WEBP", "RGB"), ("png", "PNG", "L")]


def captions_of(number):
  return ["only  one"] if number % 3 else [f"photo {number}", f"\u00fc also {number}"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Pictures of several formats with captions beside them, one or two."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for number in range(COUNT):
    end, kind, mode = ENDS[number % len(ENDS)]
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = rng.integers(0, 256, (5 + number, 7, channels), np.uint8).squeeze()
    path = folder / f"{number % 2}" / f"{number:02d}.x.{end}"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels, mode).save(path, kind)
    path.with_suffix(".txt").write_text("\n".join(captions_of(number)))
  return folder


def convert(source, folder, executor=None, **options):
  done = converting.convert(source, Path(folder), executor or Here(), **{"shard_bytes": 9000, **options})
  kind, _, place = done.name.partition("/")
  return IndexedSource(kind, place)


def files_in(folder):
  return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def test_tars_hold_the_bytes_and_captions_as_webdatasets_reader_gives_them(photos, tmp_path):
  source = open_folder(str(photos))
  made = convert(source, tmp_path / "out")
  assert len(files_in(tmp_path / "out")) > 2 and len(made) == COUNT
  theirs = list(
    webdataset.WebDataset([f"{tmp_path}/out/{name}" for name in files_in(tmp_path / "out")], shardshuffle=False)
  )
  for k, sample in enumerate(theirs):
    path = photos / source.sample_name(k)
    assert sample["__key__"] == f"{k:09d}" and sample[path.suffix[1:]] == path.read_bytes()
    said = [sample["txt"].decode()] if "txt" in sample else json.loads(sample["json"])["caption"]
    assert said == captions_of(int(path.name[:2])) and ("json" in sample) == (len(said) > 1)
    np.testing.assert_array_equal(made[k].image, source[k].image)
    assert made.text(k).captions == tuple(said)
  assert len({made.text(k).group for k in range(COUNT)}) == COUNT
  assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar") == [
    "all.tar.index", "convert.json",
  ]  # fmt: skip


class Shuffled(concurrent.futures.ThreadPoolExecutor):
  """Runs each call only once all were submitted, in an order of its own."""

  def __init__(self):
    super().__init__(4)
    self._waiting = []

  def submit(self, function, /, *arguments):
    future = concurrent.futures.Future()

    def call():
      try:
        future.set_result(function(*arguments))
      except Exception as error:
        future.set_exception(error)

    self._waiting.append(call)
    if len(self._waiting) > 2:
      random.Random(0).shuffle(self._waiting)
      while self._waiting:
        super().submit(self._waiting.pop())
    return future


def test_the_order_of_the_work_changes_nothing(photos, tmp_path):
  source = open_folder(str(photos))
  convert(source, tmp_path / "one")
  with concurrent.futures.ThreadPoolExecutor(4) as executor:
    convert(source, tmp_path / "four", executor)
  assert files_in(tmp_path / "one") == files_in(tmp_path / "four")
  (one, four) = (next((tmp_path / name / "all.tar.index").glob("part-*")).read_bytes() for name in ("one", "four"))
  assert one == four


def test_what_is_in_a_set_of_each_kind_is_in_its_tars(photos, tmp_path):
  rows = [{"image": f"{k % 2}/{k:02d}.x.{ENDS[k % 4][0]}", "caption": said, "score": k / COUNT}
          for k in range(COUNT) for said in captions_of(k)]  # fmt: skip
  with open(photos / "all.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  stored = pa.table({"photo": [(photos / row["image"]).read_bytes() for row in rows],
                     "caption": [[row["caption"], " a blank before"] for row in rows]})  # fmt: skip
  (tmp_path / "columns").mkdir()
  pq.write_table(stored, tmp_path / "columns" / "a.parquet", row_group_size=7)
  (tmp_path / "raw").mkdir()
  records = RecordWriter(str(tmp_path / "raw" / "a.tfrecord"))
  for k in range(5):
    shape = {"image/height": 4 + k, "image/width": 6, "image/channels": 3}
    records.write(example(**{"image/raw": bytes(range(72 + 18 * k)), "image/caption": b"raw", **shape}))
  records.close()
  for kind, place in (("parquet", tmp_path / "columns"), ("tfrecord", tmp_path / "raw")):
    wanted = indexing.Wanted(kind, texts=FORMATS[kind].texts)
    indexing.build(wanted, sorted(map(str, place.glob(f"*.{kind}"))), Path(index_folder(str(place))), Here())
  sources = [
    TableSource(f"{photos}/all.csv", filter="score > 0.3"),
    IndexedSource("parquet", f"{tmp_path}/columns@train"),
    IndexedSource("tfrecord", f"{tmp_path}/raw"),
  ]
  for number, source in enumerate(sources):
    made = convert(source, tmp_path / str(number))
    assert len(made) == len(source) > 3
    for k in range(len(source)):
      np.testing.assert_array_equal(made[k].image, source[k].image)
      assert made.text(k).captions == source.text(k).captions
  # And of tars again: nothing is lost on the way.
  again = convert(made, tmp_path / "again")
  assert files_in(tmp_path / "again") == files_in(tmp_path / "2") and again.shard_of(0).endswith("again/000000.tar")


def test_pictures_of_one_class_stay_of_one_group(photos, tmp_path):
  for name in ("red_cat", "dog"):
    (tmp_path / "in" / name).mkdir(parents=True)
    for k in range(3):
      Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / "in" / name / f"{k}.png")
  source = open_folder(str(tmp_path / "in"), templates=("a {}.", "one {}."))
  made = convert(source, tmp_path / "out")
  assert [made.text(k) for k in range(6)] == [source.text(k) for k in range(6)]
  again = convert(made, tmp_path / "again")
  assert [again.text(k).group for k in range(6)] == [source.text(k).group for k in range(6)]


@pytest.fixture
def damaged(photos, tmp_path):
  folder = tmp_path / "damaged"
  shutil.copytree(photos, folder)
  jpeg = folder / "0" / "08.x.jpg"
  jpeg.write_bytes(jpeg.read_bytes()[:-60])
  (folder / "1" / "07.x.png").write_bytes(b"hello")
  (folder / "1" / "03.x.txt").unlink()
  return folder


def test_bad_records_are_left_out_counted_and_named(damaged, tmp_path):
  source = open_folder(str(damaged))
  made = convert(source, tmp_path / "out")
  assert len(made) == COUNT - 3
  bad = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
  assert sorted(row["reason"].partition(":")[0] for row in bad) == ["0/08.x.jpg", "1/03.x.png", "1/07.x.png"]
  assert {row["use"] for row in bad} == {"conversion"} and bad[0]["shard"] == str(damaged / "0" / "08.x.jpg")
  by_header = convert(source, tmp_path / "quick", check=False)
  assert len(by_header) == COUNT - 2  # A cut JPEG has a sound header.
  for path in damaged.rglob("*.txt"):
    path.unlink()
  with pytest.raises(UserError, match=r"none of the samples that were looked at can be read, .* is not beside it"):
    convert(source, tmp_path / "none")


def stamp(path):
  found = path.stat()
  return found.st_ino, found.st_mtime_ns


class Stopping(Here):
  """Is interrupted at its third call."""

  calls = 0

  def submit(self, function, /, *arguments):
    self.calls += 1
    if self.calls == 3:
      raise KeyboardInterrupt
    return super().submit(function, *arguments)


def interrupted(source, folder):
  """Leaves two tars of which one was told of, and a third that is half written."""
  with pytest.raises(KeyboardInterrupt):
    convert(source, folder, Stopping())
  work = folder / ".convert"
  assert sorted(files_in(folder)) == ["000000.tar", "000001.tar"] and not (folder / "convert.json").exists()
  shard = converting.write_shard(
    str(work), 0, 0, json.loads((work / "request.json").read_text())["samples_per_shard"], True
  )
  converting.runs.write_object(work / "000000.json", shard._asdict())
  (work / "000002.tar.abc.partial").write_bytes(b"half")


def test_the_same_command_goes_on_with_what_is_left(photos, tmp_path):
  source = open_folder(str(photos))
  whole = convert(source, tmp_path / "whole")
  interrupted(source, tmp_path / "out")
  kept = stamp(tmp_path / "out" / "000000.tar")
  made = convert(open_folder(str(photos)), tmp_path / "out")
  assert files_in(tmp_path / "out") == files_in(tmp_path / "whole") and len(made) == len(whole)
  assert stamp(tmp_path / "out" / "000000.tar") == kept != stamp(tmp_path / "out" / "000001.tar")
  stamps = {path: stamp(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}
  convert(source, tmp_path / "out")  # Nothing is left to do.
  assert {path: stamp(path) for path in stamps} == stamps


def test_another_request_for_the_same_folder_is_refused(photos, tmp_path):
  source = open_folder(str(photos))
  interrupted(source, tmp_path / "out")
  for finish in (False, True):
    if finish:
      convert(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"written with shard_bytes=9000, and now it is 5000: give the same again, or"):
      convert(source, tmp_path / "out", shard_bytes=5000)
    with pytest.raises(UserError, match=r"written with check=True, and now it is False"):
      convert(source, tmp_path / "out", check=False)
    with pytest.raises(UserError, match="with samples=30, and now it is"):
      convert(open_folder(f"{photos}@train"), tmp_path / "out")
  shutil.copytree(photos, tmp_path / "other")
  file = tmp_path / "other" / "0" / "00.x.txt"
  file.write_text("something else")
  with pytest.raises(UserError, match="holds tars of samples that have changed since"):
    convert(open_folder(str(tmp_path / "other")), tmp_path / "out")
  (tmp_path / "out" / "000001.tar").unlink()
  with pytest.raises(UserError, match=r"000001.tar is missing or has changed"):
    convert(source, tmp_path / "out")
  with pytest.raises(UserError, match=r"holds 000000.tar already: name a folder without tars"):
    (tmp_path / "out" / "convert.json").unlink()
    convert(source, tmp_path / "out")


def test_a_folder_that_reads_as_a_pattern_is_refused(photos, tmp_path):
  with pytest.raises(UserError, match=r"out\{1\} has '\{' in its path"):
    convert(open_folder(str(photos)), tmp_path / "out{1}")


def test_a_tar_that_cannot_be_written_is_named_and_not_there(photos, tmp_path):
  source = open_folder(str(photos))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
  try:
    with pytest.raises(OSError, match=r"File too large: '.*/out/\d+.tar'"):
      convert(source, tmp_path / "out")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not files_in(tmp_path / "out") and not list((tmp_path / "out" / ".convert").glob("*.partial"))
  assert len(convert(source, tmp_path / "out")) == COUNT


def test_tars_of_tar_itself_hold_the_same(photos, tmp_path):
  convert(open_folder(str(photos)), tmp_path / "out")
  for data in files_in(tmp_path / "out").values():
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
      assert {(member.mtime, member.uid, member.mode, member.isfile()) for member in archive} == {(0, 0, 0o644, True)}
