"""Parquet files and sets of Hugging Face's datasets: read as their own library reads them, or refused."""

import concurrent.futures
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive_jax.errors import UserError
from data.files import Files
from data.sources.indexed import IndexedSource, files_of
from tests.data.in_shards import COUNT, build, pixels, png


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A set of Hugging Face's datasets: pictures whose grey level is their number, captions, classes and scores."""
  datasets = pytest.importorskip("datasets")
  rows = {
    "image": [{"bytes": png(k), "path": f"{k}.png"} for k in range(COUNT)],
    "caption": [[f"picture {k}", f"also {k}"] for k in range(COUNT)],
    "label": [k % 2 for k in range(COUNT)],
    "score": [k / COUNT for k in range(COUNT)],
  }
  features = datasets.Features(
    image=datasets.Image(),
    caption=datasets.Sequence(datasets.Value("string")),
    label=datasets.ClassLabel(names=["cat", "dog"]),
    score=datasets.Value("float64"),
  )
  return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_sets_of_datasets_are_as_it_reads_them(saved, tmp_path, kind):
  if kind == "parquet":
    for shard in range(3):
      saved.shard(3, shard, contiguous=True).to_parquet(tmp_path / f"train-{shard:05d}-of-00003.parquet", batch_size=7)
  else:
    saved.save_to_disk(tmp_path, num_shards=3)
  texts = ("caption", "label")
  build(kind, tmp_path, texts=texts, columns=("score",))
  weights = {"caption": 1.0, "label": 1.0}
  source = pickle.loads(pickle.dumps(IndexedSource(kind, str(tmp_path), caption_key=weights, filter="score >= 0.1")))
  theirs = [row for row in saved if row["score"] >= 0.1]
  assert len(source) == len(theirs) == 36
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    examples = list(pool.map(source.__getitem__, range(36)))
  for row, example in zip(theirs, examples, strict=True):
    np.testing.assert_array_equal(example.image, np.asarray(row["image"]))
    assert example.text.captions == (*row["caption"], ("cat", "dog")[row["label"]])
    assert example.text.cumulative == (0.25, 0.5, 1.0)


@pytest.mark.slow
def test_a_set_of_several_splits_or_with_a_selection_is_refused(saved, tmp_path):
  datasets = pytest.importorskip("datasets")
  datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
  with pytest.raises(UserError, match=r"holds the splits train, test: name one, as in huggingface/.*both/train"):
    files_of("huggingface", str(tmp_path / "both"), Files())
  build("huggingface", tmp_path / "both" / "test", texts=("caption",))
  assert len(IndexedSource("huggingface", str(tmp_path / "both" / "test"))) == COUNT


BINARY = pa.binary()
STORED = [BINARY, pa.large_binary(), pa.struct({"bytes": BINARY, "path": pa.string()})]


def arrow_table(schema_of=BINARY):
  pictures = [png(k) for k in range(8)]
  if pa.types.is_struct(schema_of):
    pictures = [{"bytes": picture, "path": None} for picture in pictures]
  return pa.table({"photo": pa.array(pictures, schema_of), "text": [f"picture {k}" for k in range(8)]})


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_columns_of_bytes_are_found_and_read(tmp_path, kind, stored):
  table = arrow_table(stored)
  if kind == "parquet":
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
  else:
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
      writer.write_table(table, max_chunksize=3)
  build(kind, f"{tmp_path}/a.*")
  source = IndexedSource(kind, f"{tmp_path}/a.*")
  for k in (7, 0, 3, 2, 5, 1, 6, 4):
    np.testing.assert_array_equal(source[k].image, pixels(k))
    assert source.text(k).captions == (f"picture {k}",)


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_cut_files_of_arrow_are_refused(tmp_path, kind):
  path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
  if kind == "parquet":
    pq.write_table(arrow_table(), path)
  else:
    with pa.ipc.new_stream(str(path), arrow_table().schema) as writer:
      writer.write_table(arrow_table(), max_chunksize=3)
  whole = path.read_bytes()
  for cut in np.random.default_rng(0).integers(0, len(whole), 30):
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"a\.(parquet|arrow) cannot be indexed, it is (no whole|cut)"):
      build(kind, path)


@pytest.mark.parametrize(
  ("columns", "options", "said"),
  [
    ({"text": ["a"]}, {}, "no column of text holds the bytes of pictures: name one with --image_key"),
    ({"a": [b"1"], "b": [b"2"], "text": ["a"]}, {}, "the columns a, b hold the bytes of pictures: name one"),
    ({"photo": [b"1"], "text": ["a"]}, {"image_key": "phoot"}, "did you mean 'photo'"),
    ({"photo": [b"1"], "text": ["a"]}, {}, "1 with bytes that are no picture"),
  ],
)
def test_the_column_of_pictures_has_to_be_clear(tmp_path, columns, options, said):
  pq.write_table(pa.table(columns), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=said):
    build("parquet", tmp_path, **options)
