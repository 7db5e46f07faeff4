"""TFRecord files: read as they were written, without TensorFlow, and refused where they are damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter

from contrastive_jax.errors import UserError
from data.sources.indexed import IndexedSource
from tests.data.in_shards import build, example, pixels, png


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  """TFRecord files in tensorboardX's framing."""
  folder = tmp_path_factory.mktemp("records")
  for shard in range(2):
    writer = RecordWriter(str(folder / f"{shard}.tfrecord"))
    for k in range(shard * 5, shard * 5 + 5):
      said = {"caption": [f"picture {k}".encode(), b"also"], "score": k / 8, "kind": k, "label": b"a"}
      writer.write(example(picture=png(k), **said))
    writer.close()
  return folder


def test_tfrecords_are_read_without_tensorflow(records):
  build("tfrecord", records, columns=("score", "kind", "label"))
  source = IndexedSource("tfrecord", f"{records}", filter="score >= 0.25 and kind != 4 and label == 'a'")
  assert len(source) == 7
  for k, number in enumerate((2, 3, 5, 6, 7, 8, 9)):
    np.testing.assert_array_equal(source[k].image, pixels(number))
    assert source.text(k).captions == (f"picture {number}", "also")


def test_what_tensorflow_wrote_is_read(tmp_path):
  """`tensorflow.tfrecord` was written by TensorFlow 2.21, with features of every kind and one without a value."""
  shutil.copy(Path(__file__).parent / "tensorflow.tfrecord", tmp_path)
  build("tfrecord", tmp_path, texts=("captions",), columns=("similarity", "label"))
  source = IndexedSource("tfrecord", str(tmp_path), filter="similarity > 0.2 and label >= -1")
  assert [source.text(k).captions for k in range(len(source))] == [
    ("the first of 2 \u00fc", "another of 2"), ("the first of 3 \u00fc", "another of 3"),
  ]  # fmt: skip
  for k, number in enumerate((2, 3)):
    assert source[k].image.shape == (10 + number, 12, 3)
    assert np.abs(source[k].image.astype(int) - 40 * number).max() <= 3


def test_raw_pixels_are_read_by_the_shape_beside_them(tmp_path):
  writer = RecordWriter(str(tmp_path / "raw.tfrecord"))
  for k in range(3):
    shape = {"image/height": 4 + k, "image/width": 6, "image/channels": 3}
    writer.write(example(**{"image/raw": pixels(k).tobytes(), "image/caption": f"picture {k}".encode(), **shape}))
  writer.close()
  build("tfrecord", tmp_path)
  source = IndexedSource("tfrecord", str(tmp_path))
  for k in range(3):
    np.testing.assert_array_equal(source[k].image, pixels(k))


def test_damaged_tfrecords_are_refused_at_every_flip_and_cut(records, tmp_path):
  whole = (records / "0.tfrecord").read_bytes()
  rng = np.random.default_rng(0)
  for at in rng.integers(0, len(whole), 40):
    (tmp_path / "a.tfrecord").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"a.tfrecord cannot be indexed, (a checksum differs|it is cut)"):
      build("tfrecord", tmp_path)
  for cut in rng.integers(1, len(whole) - 1, 20):
    (tmp_path / "a.tfrecord").write_bytes(whole[:cut])
    try:
      build("tfrecord", tmp_path)
    except UserError as error:
      assert "it is cut" in str(error)
    else:
      assert whole[cut : cut + 12] and len(IndexedSource("tfrecord", str(tmp_path))) < 5  # Cut between two records.


def test_the_picture_of_a_record_has_to_be_clear(tmp_path):
  writer = RecordWriter(str(tmp_path / "a.tfrecord"))
  writer.write(example(left=png(1), right=png(2), caption=b"two"))
  writer.close()
  with pytest.raises(UserError, match="the pictures left, right: name the feature of the picture with --image_key"):
    build("tfrecord", tmp_path)
  build("tfrecord", tmp_path, image_key="right")
  np.testing.assert_array_equal(IndexedSource("tfrecord", str(tmp_path))[0].image, pixels(2))
  with pytest.raises(UserError, match=r"no picture in 'rihgt' \(did you mean 'right'"):
    build("tfrecord", tmp_path, image_key="rihgt")
