"""Splits in TFDS's notation hold the records that TFDS itself reads, and their overlaps are counted."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import LabelledSet, PairSet
from data import tasks
from data.sources.splits import overlap, ranges
from data.sources.tfds import Records, TfdsSource

FIRST = {"train": 0, "a-b": 100, "test": 200}


class Numbered(tfds.core.GeneratorBasedBuilder):
  """Three splits of records that know their number, with pictures as pixels, and features of every kind."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = {
      "number": np.int64,
      "photo": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8),
      "floats": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.float32),
      "title": tfds.features.Text(),
      "caption": tfds.features.Text(),
      "remarks": tfds.features.Sequence(tfds.features.Text()),
      "words": {"en": tfds.features.Text(), "de": tfds.features.Text()},
      "kind": tfds.features.ClassLabel(names=["even", "odd"]),
      "kinds": tfds.features.Sequence(tfds.features.ClassLabel(names=["even", "odd"])),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._some(0, 10), "a-b": self._some(100, 7), "test": self._some(200, 5)}

  def _some(self, first, count):
    for k in range(first, first + count):
      pixels = np.full((4, 4, 3), k, np.uint8)
      yield (
        k,
        {
          "number": k,
          "photo": pixels,
          "floats": pixels / np.float32(255),
          "title": f"title {k}",
          "caption": f"caption {k}",
          "remarks": [f"remark {k}"] * (k % 2),
          "words": {"en": f"word {k}", "de": f"Wort {k}"},
          "kind": k % 2,
          "kinds": [k % 2],
        },
      )

  def _generate_examples(self):
    raise NotImplementedError


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
  made = Numbered(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
  made.download_and_prepare()
  return made


def numbers(builder, spec):
  parts = ranges(spec, builder.info.splits, "numbered")
  return [FIRST[part.split] + k for part in parts for k in range(part.start, part.stop)]


@pytest.mark.parametrize(
  "spec",
  [
    "train",
    "a-b",
    "a-b[2:]",
    "a-b[:50%]",
    "train[:15%]",
    "train[:25%]",
    "train[:33.3%]",
    "train[-50%:]",
    "train[-3:]",
    "train[:-3]",
    "train[2:4]",
    "train[-3:-1]",
    "all",
    "train+test",
    "train[:3]+test",
    "train[:3] + a-b[50%:]",
    "train+train",
    "train[:1%]+test",
    "train[0shard]",
    "train[:1shard]",
    "train[-1shard]",
    "test[:80%]",
    "train[85%:]",
    "train[20%:40%]",
  ],
)
def test_a_split_holds_what_tfds_reads(builder, spec):
  expected = [int(record["number"]) for record in builder.as_data_source(split=spec)]
  assert numbers(builder, spec) == expected
  records = Records("numbered", builder.data_path.parent.parent, spec)
  assert [int(records[k]["number"]) for k in range(len(records))] == expected


@pytest.mark.parametrize(
  ("spec", "said"),
  [
    ("train[:1%]", "holds no record: a-b has 7"),
    ("train[:0]", "holds no record"),
    ("train[8:3]", "ends before it begins"),
    ("train[80%:3]", "ends before it begins"),
    ("test+train[-1:2]+a-b", r"its part train\[9:2\] ends before"),
    ("train[5shard]", "holds no record"),
    ("train[:99]", "incompatible with 10 examples"),
    ("trian", "did you mean 'train'"),
    ("test+trian[:3]", "has no split 'trian'"),
    ("all[:3]", "does not slice 'all'"),
    ("", "cannot be read"),
    ("train[", "cannot be read"),
    ("train[3]", "cannot be read"),
    ("train[:]", "cannot be read"),
    ("train[::2]", "cannot be read"),
    ("train[:101%]", "cannot be read"),
    ("train[0.5:3]", "cannot be read"),
    ("+test", "cannot be read"),
  ],
)
def test_what_tfds_cannot_read_is_one_sentence(builder, spec, said):
  with pytest.raises(UserError, match=said) as caught:
    Records("numbered", builder.data_path.parent.parent, spec)
  assert "\n" not in str(caught.value)


def random_split(random):
  """One to three parts of which most can be read and some cannot."""

  def edge():
    size = random.randint(-12, 12)
    return random.choice(["", f"{size}", f"{size}", f"{10 * size}%", f"{10 * size}%", f"{size / 0.3:.1f}%", "1shard"])

  def part():
    name = random.choice(["train", "a-b", "test"])
    return random.choice([name, *[f"{name}[{edge()}:{edge()}]"] * 4, f"{name}[{edge()}]", "all"])

  return random.choice(["+", " + "]).join(part() for _ in range(random.choice([1, 1, 2, 3])))


def test_random_splits_hold_what_tfds_reads_or_are_one_sentence(builder):
  draw, read = random.Random(0), {}
  for _ in range(400):
    spec = random_split(draw)
    try:
      read[spec] = numbers(builder, spec)
    except UserError as error:
      assert len(str(error).splitlines()) == 1
  for spec in list(read)[:40]:
    assert read[spec] == [int(record["number"]) for record in builder.as_data_source(split=spec)]
  assert len(read) > 60
  for first, second in itertools.product(list(read)[:30], list(read)[-30:]):
    shared = sum(read[second].count(number) for number in read[first])
    assert overlap(*(ranges(spec, builder.info.splits, "numbered") for spec in (first, second))) == shared


@pytest.mark.parametrize(
  ("first", "second"),
  [
    ("train", "train[80%:]"),
    ("train[:80%]", "train[80%:]"),
    ("train[:81%]", "train[-2:]"),
    ("train[:85%]", "train[80%:]"),
    ("all", "test[:2]"),
    ("train+test", "a-b"),
    ("train[:5]+test[:1]", "train[4:]+test"),
    ("a-b[3:]", "a-b[:-4]"),
    ("a-b[2:]", "a-b[:-4]"),
  ],
)
def test_overlaps_are_counted(builder, first, second):
  infos = builder.info.splits
  expected = len(set(numbers(builder, first)) & set(numbers(builder, second)))
  assert overlap(ranges(first, infos, "n"), ranges(second, infos, "n")) == expected
  where = str(builder.data_path.parent.parent)
  assert tasks.shared_records(f"tfds/numbered@{first}", f"tfds/numbered@{second}", where) == expected


def test_pixels_stored_as_numbers_are_pictures(builder):
  where = str(builder.data_path.parent.parent)
  opened = tasks.load("tfds/numbered:image_key=photo:label_key=kind", where)
  assert isinstance(opened, LabelledSet) and list(opened.labels) == [0, 1, 0, 1, 0]
  np.testing.assert_array_equal(opened.images[3], np.full((4, 4, 3), 203, np.uint8))
  trained = TfdsSource("numbered", where, "test", image_key="photo", caption_key="title")
  np.testing.assert_array_equal(trained[3].image, opened.images[3])


def test_features_are_named_behind_the_set_by_flags_or_by_the_config(builder):
  where = str(builder.data_path.parent.parent)
  photo = {"image_key": "photo"}
  assert tasks.load("tfds/numbered", where, photo).captions[0] == "caption 200"
  assert tasks.load("tfds/numbered", where, {}, photo).captions[0] == "caption 200"
  assert tasks.load("tfds/numbered", where, photo, {"caption_key": "title"}).captions[0] == "title 200"
  named = tasks.load("tfds/numbered:1.0.0@a-b:caption_key=title", where, photo, {"caption_key": "kind"})
  assert isinstance(named, PairSet) and named.captions[6] == "title 106"
  assert named.name == "tfds/numbered:1.0.0@a-b:caption_key=title"
  assert isinstance(tasks.load("tfds/numbered", where, photo, {"caption_key": "kind"}), LabelledSet)
  # The default of a config's caption is not found in a set without it, and is no error.
  assert isinstance(tasks.load("tfds/numbered", where, photo, {"caption_key": "nowhere"}), PairSet)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("tfds/numbered", "has no feature 'image': name one of .* with --image_key"),
    ("tfds/numbered:image_key=floats", "holds no pictures, it is Tensor.*: name one of photo"),
    ("tfds/numbered:image_key=title", "holds no pictures"),
    ("tfds/numbered:image_key=number", "holds no pictures"),
    ("tfds/numbered:image_key=kind", "holds no pictures"),
    ("tfds/numbered:image_key=phoot", "did you mean 'photo'"),
    ("tfds/numbered:image_key=photo:caption_key=number", "holds no text, .* name one of caption, remarks, title"),
    ("tfds/numbered:image_key=photo:caption_key=floats", "holds no text"),
    ("tfds/numbered:image_key=photo:caption_key=remarks", "3 of 5 records without a caption in 'remarks'"),
    ("tfds/numbered:image_key=photo:label_key=kinds", "several classes a record"),
    ("tfds/numbered:image_key=photo:label_key=title", "has no class names"),
    ("tfds/numbered:image_key=photo:label_key=number", "has no class names"),
    ("tfds/numbered:image_key=photo:label_key=kind:caption_key=title", "name one of the two"),
    ("tfds/numbered:image=photo", "feature='image' is unknown"),
    ("cifar10:label_key=label", "only sets of the forms tfds/<set>, table/<file> and of shards"),
    ("emoji_openmoji:label_key=label", "only sets of the forms tfds/<set>, table/<file> and of shards"),
  ],
)
def test_features_that_cannot_be_scored_are_one_sentence(builder, name, said):
  with pytest.raises(UserError, match=said):
    tasks.load(name, str(builder.data_path.parent.parent))


@pytest.mark.parametrize("extra", [{"classes": "ab"}, {"templates": ["{0}"]}, {"templates": "{}"}, {"classes": ["a"]}])
def test_a_set_is_checked_as_a_model_is(extra):
  fields = {"images": [Image.new("RGB", (2, 2))], "labels": np.array([0]), "classes": ["a", "b"], "templates": ["{}"]}
  LabelledSet("toy", **fields)
  with pytest.raises(UserError, match=r"toy: (classes|templates)"):
    LabelledSet("toy", **(fields | extra))


class Masked(tfds.core.GeneratorBasedBuilder):
  """Features that are stored as images and show none."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = {
      "depth": tfds.features.Image(shape=(4, 4, 4)),
      "mask": tfds.features.LabeledImage(shape=(4, 4, 1), labels=["road", "sky"]),
      "photo": tfds.features.Image(shape=(4, 4, 3)),
      "label": tfds.features.ClassLabel(names=["even", "odd"]),
      "caption": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"test": self._generate_examples()}

  def _generate_examples(self):
    def png(mode):
      file = io.BytesIO()
      Image.new(mode, (4, 4)).save(file, "PNG")
      return io.BytesIO(file.getvalue())

    for k in range(2):
      yield k, {"depth": png("RGBA"), "mask": png("L"), "photo": png("RGB"), "label": k, "caption": f"number {k}"}


def test_distances_and_classes_of_pixels_are_neither_pictures_nor_labels(tmp_path):
  Masked(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  # TFDS encodes float32 with TensorFlow alone, as the channels of a PNG, so that this becomes one afterwards.
  described = tmp_path / "masked/1.0.0/features.json"
  content = json.loads(described.read_text())
  content["featuresDict"]["features"]["depth"]["image"] = {
    "shape": {"dimensions": ["4", "4", "1"]},
    "dtype": "float32",
    "encodingFormat": "png",
  }
  described.write_text(json.dumps(content))
  opened = tasks.load("tfds/masked@test", str(tmp_path))
  assert isinstance(opened, LabelledSet) and opened.images[0].shape == (4, 4, 3)  # The only picture there is.
  for key in ("depth", "mask"):
    with pytest.raises(UserError, match=r"holds no pictures.*name one of photo"):
      tasks.load(f"tfds/masked@test:image_key={key}", str(tmp_path))
    with pytest.raises(UserError, match="holds no pictures"):
      TfdsSource("masked", tmp_path, "test", image_key=key)
  with pytest.raises(UserError, match="several classes a record"):
    tasks.load("tfds/masked@test:image_key=photo:label_key=mask", str(tmp_path))
  with pytest.raises(UserError, match="several classes a record"):
    TfdsSource("masked", tmp_path, "test", image_key="photo", caption_key="mask")


@pytest.mark.parametrize("key", ["number", "photo", "floats", "words", "kinds"])
def test_a_feature_without_captions_cannot_be_trained_on(builder, key):
  said = "several classes" if key == "kinds" else "holds no text, .* name one of caption, remarks, title"
  with pytest.raises(UserError, match=said):
    TfdsSource("numbered", builder.data_path.parent.parent, image_key="photo", caption_key=key)
