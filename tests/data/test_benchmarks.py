"""Every benchmark is read from a tiny set of the structure that TFDS gives it, written through TFDS."""

import io
import json
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.benchmarks import BENCHMARKS, GENERIC
from contrastive_jax.evaluation.tasks import LabelledSet, MultiLabelSet, PairSet
from contrastive_jax.preprocess.video import Clip
from data import tasks
from data.emoji import LANGUAGES
from data.sources.tfds import TfdsSource

RECORDS = 10
# What the builders in TFDS 4.9.10 write; all others write train and test.
SPLITS = {
  "imagenet2012": "train validation test",
  "imagenet_v2/matched-frequency": "test",
  "imagenet_a": "test",
  "imagenet_r": "test",
  "imagenet_sketch": "test",
  "food101": "train validation",
  "oxford_flowers102": "train test validation",
  "dtd": "train test validation",
  "eurosat/rgb": "train",
  "resisc45": "train",
  "sun397/tfds": "train test validation",
  "svhn_cropped": "train test extra",
  "patch_camelyon": "test train validation",
  "clevr": "train validation test",
  "dsprites": "train",
  "kitti": "train validation test",
  "diabetic_retinopathy_detection/btgraham-300": "sample train validation test",
  "voc/2007": "test train validation",
  "coco_captions/2014": "train val test restval",
}
# Sets whose names of labels come with the data, not with TFDS.
NAMES = {
  "cifar10": [*"abcdefghi", "cargo_ship"],
  "cifar100": [f"fine_{k}" for k in range(100)],
  "stanford_dogs": ["n02085620-chihuahua", "n02085782-japanese_spaniel", "n02113186-cardigan"],
}
CLASSES = {"imagenet": 1000, "imagenet_v2": 1000, "imagenet_a": 200, "imagenet_r": 200, "imagenet_sketch": 1000} | {
  "cifar10": 10,
  "cifar100": 100,
  "food101": 101,
  "oxford_iiit_pet": 37,
  "oxford_flowers102": 102,
  "dtd": 47,
  "eurosat": 10,
  "resisc45": 45,
  "caltech101": 102,
  "cars196": 196,
  "stanford_dogs": 3,
  "sun397": 397,
  "svhn_cropped": 10,
  "mnist": 10,
  "patch_camelyon": 2,
  "clevr_count": 8,
  "dsprites_orientation": 16,
  "dsprites_x_position": 16,
  "kitti_distance": 4,
  "diabetic_retinopathy": 5,
  "smallnorb_azimuth": 18,
  "smallnorb_elevation": 9,
  "voc2007": 20,
  "ucf101": 101,
}
# Which of the ten records the split holds, in order.
HELD = {"eurosat": [8, 9], "resisc45": [8, 9], "dsprites_orientation": [9], "dsprites_x_position": [9]} | {
  "smallnorb_azimuth": [5, 6, 7, 8, 9],
  "smallnorb_elevation": [5, 6, 7, 8, 9],
}
IN_TFDS = [name for name, benchmark in BENCHMARKS.items() if benchmark.tfds]


def structure(name):
  """The features of a set, as the installed TFDS declares them; the two that need TensorFlow for it by hand."""
  features = tfds.features
  if name == "coco_captions/2014":
    box = {"area": np.int64, "bbox": features.BBoxFeature(), "id": np.int64, "is_crowd": np.bool_}
    return {
      "captions": features.Sequence({"id": np.int64, "text": np.str_}),
      "image": features.Image(encoding_format="jpeg"),
      "image/filename": features.Text(),
      "image/id": np.int64,
      "objects": features.Sequence({**box, "label": features.ClassLabel(num_classes=80)}),
    }
  if name == "ucf101/ucf101_1":
    labels = tfds.core.tfds_path("video/ucf101_labels.txt")
    frames = features.Sequence(features.Image(encoding_format="jpeg"))
    return {"label": features.ClassLabel(names_file=labels), "video": frames}
  found = dict(tfds.builder(name, data_dir="nowhere", try_gcs=False).info.features)
  if name in NAMES:
    found["label"] = features.ClassLabel(names=NAMES[name])
  return found


def png(i, shape=(None, None, 3), brightness=20):
  height, width, channels = (side or default for side, default in zip(shape, (6 + i, 5, 3), strict=True))
  pixels = np.full((height, width, channels), brightness * i, np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "PNG")
  return io.BytesIO(file.getvalue())


def value(feature, i):
  """Something that fits a feature, different for each record."""
  features = tfds.features
  if isinstance(feature, features.Image):
    return png(i, feature.shape)
  if isinstance(feature, features.BBoxFeature):
    return features.BBox(0.0, 0.0, 0.5, 1.0)
  if isinstance(feature, features.ClassLabel):
    return (7 * i + 3) % feature.num_classes
  if isinstance(feature, features.Sequence):
    return [value(feature.feature, i + k) for k in range(2)]
  if isinstance(feature, features.FeaturesDict):
    return {key: value(inner, i) for key, inner in feature.items()}
  if isinstance(feature, features.Text) or feature.np_dtype == np.object_:
    return f"text {i}"
  return np.full(feature.shape, i, feature.np_dtype)


def write(folder, name, features, records):
  """A set in all its splits; `records()` are those of each, in this order."""
  dataset, _, config = name.partition("/")

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("9.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
    code_path = None

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples() for split in SPLITS.get(name, "train test").split()}

    def _generate_examples(self):
      yield from enumerate(records())  # Files are read once.

  Tiny.name = dataset
  Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


def specials(name, i, record):
  """What a record holds where the benchmark derives something from it."""
  if name in ("imagenet_a", "imagenet_r"):
    record["label"] = {"imagenet_a": "n01498041 n07720875", "imagenet_r": "n01443537 n09472597"}[name].split()[i % 2]
  elif name == "clevr_count":
    record["objects"] = [record["objects"][0]] * (3 + i % 8)
  elif name == "kitti_distance":
    nearest = [3.0, 8.0, 8.5, 20.0, 20.5, 70.0]
    near_pedestrian = {**record["objects"][0], "type": 3, "location": np.float32([0, 0, 1])}
    far_truck = {**near_pedestrian, "type": 2, "location": np.float32([1, 1, 75])}
    of_car = [{**far_truck, "type": i % 2, "location": np.float32([90, 2, nearest[i]])}] if i < 6 else []
    record["objects"] = [near_pedestrian, *([far_truck, *of_car] if i < 9 else [])]
  elif name == "voc2007":
    record["labels"] = [i, 19 - i] if i else []
  elif name == "coco_captions":
    record["captions"] = [{"id": k, "text": f"caption {k} of {i}"} for k in range(5 + i % 2)]
  elif name == "ucf101":
    record["video"] = [png(i), png(i), png(0, (6 + i, 5, 3))]
  elif BENCHMARKS[name].pixel_scale > 1:
    record["image"] = png(i % 2, (64, 64, 1), 1)
  return record


def expected_labels(name, classes):
  if name in ("imagenet_a", "imagenet_r"):
    first, last = {"imagenet_a": ("stingray", "bell pepper"), "imagenet_r": ("goldfish", "volcano")}[name]
    return [classes.index((first, last)[i % 2]) for i in range(RECORDS)]
  derived = {
    "clevr_count": [i % 8 for i in range(RECORDS)],
    "kitti_distance": [0, 0, 1, 1, 2, 2, 2, 2, 2, 3],
    # Record 9 has label 66: orientation 26 of 40 is in the eleventh of 16 parts, position 2 of 32 in the second.
    "dsprites_orientation": [10] * RECORDS,
    "dsprites_x_position": [1] * RECORDS,
  }
  return derived.get(name) or [(7 * i + 3) % CLASSES[name] for i in range(RECORDS)]


@pytest.fixture(scope="module", params=IN_TFDS)
def prepared(request, tmp_path_factory):
  name = request.param
  benchmark, folder = BENCHMARKS[name], tmp_path_factory.mktemp(name)
  features = structure(benchmark.tfds)
  record = tfds.features.FeaturesDict(features)

  def records():
    return [specials(name, i, value(record, i)) for i in range(RECORDS)]

  write(folder, benchmark.tfds, features, records)
  if name == "ucf101":
    declare_video(folder / "ucf101" / "ucf101_1" / "9.0.0" / "features.json")
  return name, folder, tasks.load(name, str(folder))


def declare_video(path):
  """Says of a sequence of pictures what TFDS says of a video; what is stored is the same."""
  content = json.loads(path.read_text())
  video = {"shape": {"dimensions": ["-1", "-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}
  content["featuresDict"]["features"]["video"] = {
    "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
    "video": video,
  }
  path.write_text(json.dumps(content))


def test_a_benchmark_is_read_as_it_is_stored(prepared):
  name, _, read = prepared
  benchmark, held = BENCHMARKS[name], HELD.get(name, list(range(RECORDS)))
  assert (read.name, len(read.images)) == (name, len(held))
  if isinstance(read, PairSet):
    assert benchmark.kind == "retrieval"
    assert read.captions == [f"caption {k} of {i}" for i in held for k in range(5 + i % 2)]
    assert read.caption_group.tolist() == [i for i in held for _ in range(5 + i % 2)]
    assert read.image_group.tolist() == held
  else:
    # ImageNet has a missile and a projectile, sunglass and sunglasses, which CLIP calls by the same names.
    assert len(read.classes) == CLASSES[name] and len(set(read.classes)) == {1000: 998}.get(
      CLASSES[name], CLASSES[name]
    )
    assert all("_" not in words and words == words.strip() for words in read.classes)
    assert len(read.templates) == len(set(read.templates)) and read.templates_source
    assert (read.templates_source == GENERIC) == (name == "stanford_dogs")
  if isinstance(read, LabelledSet):
    assert benchmark.kind == "classification"
    expected = expected_labels(name, read.classes)
    assert read.labels.tolist() == [expected[i] for i in held]
  if isinstance(read, MultiLabelSet):
    assert benchmark.kind == "multilabel" and read.labels.dtype == bool
    assert [np.flatnonzero(row).tolist() for row in read.labels] == [[i, 19 - i] if i else [] for i in held]
  for position, i in enumerate(held):
    shown = read.images[position]
    if name == "ucf101":
      assert isinstance(shown, Clip) and (shown.count, shown.fps, shown.height, shown.width) == (3, 25, 6 + i, 5)
      assert (shown.read([0, 1]) == 20 * i).all()
    elif benchmark.pixel_scale > 1:
      assert (shown == 255 * (i % 2)).all()
    else:
      assert shown.dtype == np.uint8 and shown.shape[2] == 3 and (shown == 20 * i).all()


def test_what_a_probe_learns_from_is_not_what_it_is_scored_on(prepared):
  name, folder, read = prepared
  if "train" not in SPLITS.get(BENCHMARKS[name].tfds, "train"):
    with pytest.raises(UserError, match=r"no split 'train'.*, it has test"):
      tasks.load(f"{name}@train", str(folder))
    return
  train = tasks.load(f"{name}@train", str(folder))
  assert train.name == f"{name}@train"
  assert len(train.images) == (10 - len(read.images) if BENCHMARKS[name].split.startswith("train") else 10)


def test_a_set_with_labels_in_another_order_is_still_named_right(tmp_path):
  features = structure("oxford_iiit_pet")
  names = features["label"].names[::-1]
  features["label"] = tfds.features.ClassLabel(names=names)
  write(tmp_path, "oxford_iiit_pet", features, lambda: [value(tfds.features.FeaturesDict(features), 0)])
  read = tasks.load("oxford_iiit_pet", str(tmp_path))
  assert read.classes[0] == "Yorkshire Terrier" and read.classes[36] == "Abyssinian"


def test_labels_without_a_name_are_an_error(tmp_path):
  features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["0", "1", "x"])}
  write(tmp_path, "svhn_cropped", features, lambda: [{"image": png(1), "label": 2}])
  with pytest.raises(UserError, match=r"has a label 'x' that has no name there: .* or score it as tfds/svhn_cropped"):
    tasks.load("svhn_cropped", str(tmp_path))


def test_records_of_classes_that_are_left_out_are_an_error(tmp_path):
  features = structure("imagenet_a")
  write(
    tmp_path,
    "imagenet_a",
    features,
    lambda: [{"image": png(1), "label": label, "file_name": ""} for label in (0, 6)],
  )
  with pytest.raises(UserError, match="has 1 of 2 records without one of the 200 classes of 'imagenet_a'"):
    tasks.load("imagenet_a", str(tmp_path))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_set_that_is_not_there_says_how_to_prepare_it(name, tmp_path):
  how = f"tfds build {re.escape(BENCHMARKS[name].tfds)} --data_dir={tmp_path}" if BENCHMARKS[name].tfds else "images"
  with pytest.raises(UserError, match=f"is not in {tmp_path}, prepare it .*{how}"):
    tasks.load(name, str(tmp_path))


@pytest.mark.parametrize(
  ("name", "meant"),
  [("cifar11", "cifar10"), ("cifar11@train", "cifar10"), ("sugar_crepe", "sugarcrepe"), ("winogrond", "winoground")],
)
def test_a_misspelt_name(name, meant):
  with pytest.raises(UserError, match=f"did you mean '{meant}'"):
    tasks.expand(["cifar10", name])


def test_a_group_stands_for_its_sets_each_once():
  assert tasks.expand(["winoground", "emoji_openmoji_de", "emoji_openmoji_languages", "tfds/toy@train[:9]"]) == [
    "winoground",
    "emoji_openmoji_de",
    "emoji_openmoji",
    *(f"emoji_openmoji_{language}" for language in LANGUAGES if language != "de"),
    "tfds/toy@train[:9]",
  ]
  assert len(tasks.expand(["sugarcrepe", "sugarcrepe/add_att"])) == 7


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("cifar10", "test"),
    ("imagenet", "validation"),
    ("imagenet@train", "train"),
    ("eurosat@train", "train[:80%]"),
    ("eurosat@train[80%:]", "train[80%:]"),
    ("tfds/eurosat/rgb", "test"),
    ("tfds/eurosat/rgb@train", "train"),
  ],
)
def test_the_split_that_a_name_opens(name, split):
  assert tasks.split_of(name) == split


def test_another_split_has_another_name(tmp_path):
  features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
  write(tmp_path, "toy", features, lambda: [{"image": png(1), "label": 1}])
  for name in ("tfds/toy", "tfds/toy@test", "tfds/toy@train"):
    assert tasks.load(name, str(tmp_path)).name == name


def test_clips_stored_as_pictures_are_a_source_too(tmp_path):
  features = structure("ucf101/ucf101_1")
  write(tmp_path, "ucf101/ucf101_1", features, lambda: [{"label": 100, "video": [png(1), png(1)]}])
  declare_video(tmp_path / "ucf101" / "ucf101_1" / "9.0.0" / "features.json")
  source = TfdsSource("ucf101/ucf101_1", tmp_path, image_key="video", caption_key="label")
  assert source[0].text.captions == ("a photo of a YoYo.",) and source[0].image.count == 2
