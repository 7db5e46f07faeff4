"""TFDS sets prepared and read without TensorFlow."""

import io
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import unreadable
from contrastive_jax.preprocess.images import DecodeError
from data import converting, digits
from data.sources.indexed import IndexedSource
from data.sources.tfds import TfdsSource, labelled, paired
from tests.data.in_shards import Here

ROOT = pathlib.Path(__file__).parents[2]


def png(shade):
  file = io.BytesIO()
  Image.fromarray(np.full((10 + shade, 12, 3), 10 * shade, np.uint8)).save(file, "PNG")
  return io.BytesIO(file.getvalue())


class ToyCaptions(tfds.core.GeneratorBasedBuilder):
  """Eight pictures, each with a caption, a list of captions, and a class; the last one is damaged."""

  VERSION = tfds.core.Version("1.2.3")
  code_path = None

  def _info(self):
    features = {
      "picture": tfds.features.Image(shape=(None, None, 3)),
      "caption": tfds.features.Text(),
      "captions": tfds.features.Sequence(tfds.features.Text()),
      "kind": tfds.features.ClassLabel(names=["even_one", "odd_one"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(8):
      caption = "the dog on the left" if i == 3 else f"picture {i}"
      yield (
        i,
        {
          "picture": png(i) if i < 7 else io.BytesIO(b"damaged"),
          "caption": caption,
          "captions": [f"{caption} ({k})" for k in range(1 + i % 3)],
          "kind": i % 2,
        },
      )


def prepared(tmp_path_factory, file_format):
  folder = str(tmp_path_factory.mktemp(file_format))
  ToyCaptions(data_dir=folder, file_format=file_format).download_and_prepare()
  return folder


@pytest.fixture(scope="module")
def array_records(tmp_path_factory):
  return prepared(tmp_path_factory, "array_record")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
  return prepared(tmp_path_factory, "parquet")


@pytest.fixture(params=["array_records", "parquet"])
def data_dir(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("digits"))
  digits.prepare(folder)
  return folder


def test_captions_and_pixels(data_dir):
  source = TfdsSource("toy_captions", data_dir, image_key="picture")
  assert len(source) == 8
  for i in (5, 0, 6):
    example = source[i]
    assert example.image.shape == (10 + i, 12, 3) and (example.image == 10 * i).all()
    assert example.text.captions == (f"picture {i}",) and example.id == i
    assert source.text(i) == example.text
  assert len({source.text(i).group for i in range(8)}) == 8
  assert source[2].flip and not source[3].flip
  with pytest.raises(DecodeError):
    source[7]


def test_several_captions_of_an_image(array_records):
  source = TfdsSource("toy_captions", array_records, "train[2:6]", image_key="picture", caption_key="captions")
  assert len(source) == 4
  assert source.text(0).captions == ("picture 2 (0)", "picture 2 (1)", "picture 2 (2)")


def test_captions_from_classes(data_dir):
  source = TfdsSource("toy_captions", data_dir, image_key="picture", caption_key="kind", templates=("a {}", "the {}"))
  assert source.text(3).captions == ("a odd one", "the odd one")
  assert source.text(1).group == source.text(3).group != source.text(2).group


def test_a_source_can_be_pickled(data_dir):
  source = TfdsSource("toy_captions", data_dir, image_key="picture")
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[4].image, source[4].image)


def test_a_set_is_converted_with_its_bytes_captions_and_classes(array_records, tmp_path):
  options = {"image_key": "picture", "split": "train[:7]"}
  for number, key in enumerate(("caption", "captions", "kind")):
    source = TfdsSource("toy_captions", array_records, caption_key=key, **options)
    done = converting.convert(source, tmp_path / str(number), Here())
    made = IndexedSource("webdataset", done.name.partition("/")[2])
    assert len(made) == 7
    for k in range(7):
      assert made.stored(k) == source.stored(k) and isinstance(made.stored(k), bytes)
      assert made.text(k).captions == source.text(k).captions
      assert (made.text(k).group == source.text(k).group) == (key == "kind")


class SilentRecord(ToyCaptions):
  """The toy set, whose record 2 has no captions."""

  def _generate_examples(self):
    for i, record in super()._generate_examples():
      yield i, {**record, "captions": [] if i == 2 else record["captions"], "caption": " " if i == 2 else "a dog"}


@pytest.mark.parametrize(("key", "count"), [("captions", 1 + 2 + 1 + 2 + 3 + 1), ("caption", 6)])
def test_a_record_without_captions_is_left_out_when_a_set_is_scored(key, count, tmp_path):
  SilentRecord(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  tested = paired("silent_record", str(tmp_path), "train[:7]", image_key="picture", caption_key=key)()
  good = [True] * 7
  with pytest.raises(DecodeError, match="no caption"):
    tested.images[2]
  good[2] = False
  scored, rows = unreadable.keep(tested, np.array(good))
  assert rows.tolist() == [0, 1, 3, 4, 5, 6] and len(scored.captions) == count and "" not in scored.captions


def test_a_labelled_set(array_records):
  tested = labelled("toy_captions", array_records, "train[:7]", image_key="picture", label_key="kind")()
  assert tested.classes == ["even one", "odd one"] and tested.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
  assert tested.images[6].shape == (16, 12, 3)


def test_a_retrieval_set(data_dir):
  pairs = paired("toy_captions", data_dir, "train", image_key="picture")()
  assert pairs.caption_group.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7]
  assert pairs.captions[:3] == ["picture 0 (0)", "picture 1 (0)", "picture 1 (1)"]
  assert pairs.image_group.tolist() == list(range(8))


def test_digits_are_scikit_learns(digits_dir):
  original = load_digits()
  train = TfdsSource("sklearn_digits", digits_dir, caption_key="label", templates=("the digit {}",), flip=False)
  tested = labelled("sklearn_digits", digits_dir)()
  assert (len(train), len(tested.images)) == (1437, 360)
  assert tested.classes == [str(d) for d in range(10)]
  stored = sorted(tested.images[i][..., 0].tobytes() + bytes([tested.labels[i]]) for i in range(360))
  expected = np.round(original.images[1437:] * 255 / 16).astype(np.uint8)
  assert stored == sorted(p.tobytes() + bytes([t]) for p, t in zip(expected, original.target[1437:], strict=True))
  assert train.text(0).captions[0].startswith("the digit ")


READ = """
import builtins, sys
real = builtins.__import__
def without(name, *args, **kwargs):
  if name.split(".")[0] in ("tensorflow", "keras", "torch"):
    raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
  return real(name, *args, **kwargs)
builtins.__import__ = without
from data.sources.tfds import TfdsSource, labelled
tested = labelled("sklearn_digits", sys.argv[1])()
print(len(tested.images), tested.images[0].shape, len(TfdsSource("sklearn_digits", sys.argv[1], caption_key="label")))
assert "tensorflow" not in sys.modules
"""


def test_reading_works_with_tensorflow_blocked(digits_dir):
  done = subprocess.run([sys.executable, "-c", READ, digits_dir], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.stdout.split("\n")[0] == "360 (8, 8, 3) 1437", done.stderr[-2000:]


def test_the_digits_are_prepared_by_one_command(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "data.digits", f"--data_dir={tmp_path}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert len(labelled("sklearn_digits", tmp_path)().images) == 360


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("cifar10", {}, "not in .*, prepare it with: .*tfds build cifar10 --data_dir="),
    ("sklearn_digits", {}, "python -m data.digits --data_dir="),
    ("toy_captions", {"split": "trian"}, "no split 'trian' \\(did you mean 'train'\\?\\), it has train"),
    ("toy_captions", {"split": "train"}, "no feature 'image', it has caption, captions, kind, picture"),
    ("toy_captions", {"split": "train", "image_key": "picture", "label_key": "kin"}, "did you mean 'kind'"),
    ("toy_captions", {"split": "train", "image_key": "picture", "label_key": "caption"}, "has no class names"),
  ],
)
def test_what_is_missing_is_named(array_records, name, options, message):
  with pytest.raises(UserError, match=message):
    labelled(name, array_records, **options)


def test_a_part_of_a_parquet_split_is_refused_rather_than_read_whole(parquet):
  with pytest.raises(UserError, match="should hold 3 records and gives 8"):
    TfdsSource("toy_captions", parquet, "train[:3]", image_key="picture")
