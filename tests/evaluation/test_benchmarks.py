"""The table of benchmarks against what TFDS, torchvision and CLIP_benchmark say of the same sets."""

import ast
import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from contrastive_jax.evaluation import benchmarks
from contrastive_jax.evaluation.benchmarks import BENCHMARKS, GENERIC
from contrastive_jax.evaluation.tasks import MultiLabelSet

FILES = {path.stem: json.loads(path.read_text()) for path in pathlib.Path(benchmarks.__file__).parent.glob("classes/*")}
# TFDS's label and the name that stands for it, where they are not the same words.
OTHER_WORDS = {
  "caltech101": {
    "airplanes": "airplane",
    "background_google": "background",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "faces": "off-center face",
    "faces_easy": "centered face",
    "flamingo_head": "head of a flamingo",
    "leopards": "leopard",
    "motorbikes": "motorbike",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
  },
  "oxford_flowers102": {"pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"},
  "eurosat": {
    "AnnualCrop": "annual crop land",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "SeaLake": "lake or sea",
  },
  "svhn_cropped": {
    "0": "zero",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
  },
}
IMAGENET = {0: "tench", 1: "goldfish", 151: "Chihuahua", 388: "giant panda", 954: "banana", 999: "toilet paper"}


def letters(words):
  return re.sub(r"[\W_]", "", words).lower()


def labels_of(name):
  """The labels of a set in their order, as the installed TFDS declares them without its data."""
  if name == "ucf101":
    return pathlib.Path(tfds.core.tfds_path("video/ucf101_labels.txt")).read_text().split()
  benchmark = BENCHMARKS[name]
  return tfds.builder(benchmark.tfds, data_dir="nowhere", try_gcs=False).info.features[benchmark.label_key].names


@pytest.mark.parametrize(
  "name",
  ["oxford_iiit_pet", "oxford_flowers102", "caltech101", "eurosat", "svhn_cropped", "mnist", "sun397", "ucf101"],
)
def test_names_stand_in_the_order_of_tfds_labels(name):
  labels = labels_of(name)
  classes, class_of = benchmarks.name_classes(BENCHMARKS[name], labels)
  assert class_of.tolist() == list(range(len(labels)))
  for label, words in zip(labels, classes, strict=True):
    other = OTHER_WORDS.get(name, {}).get(label)
    tail = label[3:] if name == "sun397" else label  # "/a/abbey".
    assert words == other if other else letters(words) == letters(tail)


@pytest.mark.parametrize("name", ["cars196", "dtd", "food101", "resisc45", "voc2007"])
def test_names_of_the_set_itself_are_read_as_words(name):
  benchmark = BENCHMARKS[name]
  labels = labels_of(name)
  classes, _ = benchmarks.name_classes(benchmark, labels)
  assert [words.split() for words in classes] == [label.replace("_", " ").split() for label in labels]


@pytest.mark.parametrize("name", ["imagenet", "imagenet_v2", "imagenet_sketch"])
def test_imagenet_is_named_by_wordnet_ids(name):
  labels = labels_of(name)
  assert labels == list(FILES["imagenet"]["classes"]) == sorted(labels)
  classes, _ = benchmarks.name_classes(BENCHMARKS[name], labels)
  assert {k: classes[k] for k in IMAGENET} == IMAGENET


# ImageNet's index, the position among the 200 in the authors' own table, the name.
@pytest.mark.parametrize(
  ("name", "some"),
  [
    ("imagenet_a", {6: (0, "stingray"), 207: (38, "Golden Retriever"), 397: (74, "pufferfish"), 988: (199, "acorn")}),
    ("imagenet_r", {1: (0, "goldfish"), 388: (108, "giant panda"), 988: (199, "acorn")}),
  ],
)
def test_smaller_imagenets_have_200_of_the_classes_and_labels_of_1000(name, some):
  classes, class_of = benchmarks.name_classes(BENCHMARKS[name], labels_of(name))
  assert len(classes) == 200 and np.sum(class_of >= 0) == 200
  assert (np.sort(class_of[class_of >= 0]) == np.arange(200)).all() and (class_of == -1).sum() == 800
  full, _ = benchmarks.name_classes(BENCHMARKS["imagenet"], labels_of("imagenet"))
  assert all(classes[class_of[k]] == full[k] for k in np.flatnonzero(class_of >= 0))
  assert {k: (class_of[k], classes[class_of[k]]) for k in some} == some


def test_stanford_dogs_are_named_as_in_imagenet():
  labels = ["n02113186-cardigan", "n02085620-chihuahua", "n02108089-boxer"]
  classes, _ = benchmarks.name_classes(BENCHMARKS["stanford_dogs"], labels)
  assert classes == ["Cardigan Welsh Corgi", "Chihuahua", "Boxer"]


def test_clevr_counts_from_three():
  assert [benchmarks.clevr_count({"size": [0] * n}) for n in range(3, 11)] == list(range(8))


@pytest.mark.parametrize(
  ("depths", "types", "expected"),
  [
    ([7.9], [0], 0),
    ([-1.5, 30], [1, 0], 0),
    ([8.0], [0], 0),
    ([8.1, 20.0], [2, 0], 1),
    ([20.0, 3.0], [1, 3], 1),
    ([20.1], [2], 2),
    ([500.0], [0], 2),
    ([3.0, 4.0], [3, 7], 3),
    ([], [], 3),
  ],
)
def test_kitti_is_the_nearest_vehicle(depths, types, expected):
  locations = [np.float32([50, 1, depth]) for depth in depths]
  assert benchmarks.kitti_distance({"type": types, "location": locations}) == expected


def test_dsprites_in_sixteen_classes_and_their_names():
  orientations = [benchmarks.dsprites_orientation(k) for k in range(40)]
  assert orientations == [c for c in range(16) for _ in range(3 - c % 2)]  # Three and two by turns.
  positions = [benchmarks.dsprites_x_position(k) for k in range(32)]
  assert positions == [c for c in range(16) for _ in range(2)]
  degrees = np.array([float(words.split()[0]) for words in FILES["dsprites_orientation"]["classes"]])
  percent = np.array([float(words) for words in FILES["dsprites_x_position"]["classes"]])
  # A name is no farther from what it stands for than half the width of its class.
  assert np.abs(degrees[orientations] - np.linspace(0, 360, 40)).max() < 360 / 39 + 0.5
  assert np.abs(percent[positions] - np.linspace(0, 100, 32)).max() < 50 / 31 + 0.5


def test_smallnorb_in_degrees():
  assert FILES["smallnorb_azimuth"]["classes"] == [f"{a} degrees" for a in range(0, 360, 20)]
  assert FILES["smallnorb_elevation"]["classes"] == [f"{a} degrees" for a in range(30, 75, 5)]


def test_every_file_has_a_source_and_a_use():
  used = {file for b in BENCHMARKS.values() for file in (b.classes, b.subset, b.templates) if file}
  assert used == set(FILES)
  for content in FILES.values():
    assert content["source"] and bool(content.get("templates")) == bool(content.get("templates_source"))
    assert all(template.count("{}") == 1 for template in content.get("templates", ()))


def test_no_set_borrows_prompts():
  for benchmark in BENCHMARKS.values():
    words, source = benchmarks.templates(benchmark)
    if benchmark.kind in ("classification", "multilabel"):
      assert (source == GENERIC) == (benchmark.name == "stanford_dogs")
      assert ("a bad photo of a {}." in words and len(words) == 80) == benchmark.name.startswith("imagenet")


def test_the_guide_lists_the_table():
  guide = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
  rows = {row[0].strip("`"): row[1:] for row in re.findall(r"\| (`.*?`) \| (.*?) \| `(.*?)` \| (\d*) ?\|", guide)}
  assert list(rows) == list(BENCHMARKS)
  for name, benchmark in BENCHMARKS.items():
    where, split, classes = rows[name]
    assert (where.strip("`"), split) == (benchmark.tfds or "a folder, see below", benchmark.split)
    if benchmark.classes and not benchmark.subset and name != "stanford_dogs":
      assert int(classes) == len(FILES[benchmark.classes]["classes"])


@pytest.mark.parametrize(
  "labels", [np.zeros((2, 3), int), np.zeros((2, 2), bool), np.zeros((3, 3), bool)], ids=["type", "classes", "images"]
)
def test_multilabels_are_bool_images_by_classes(labels):
  images = [np.zeros((1, 1, 3), np.uint8)] * 2
  MultiLabelSet("toy", images, np.eye(2, 3, dtype=bool), ["a", "b", "c"], ["{}"])
  with pytest.raises(ValueError, match=r"toy: labels is (bool\[2, 3\], images by classes|int64\[2, 3\], not booleans)"):
    MultiLabelSet("toy", images, labels, ["a", "b", "c"], ["{}"])


# Ours, and the key of CLIP_benchmark.
PEER = {
  "imagenet": "imagenet1k",
  "cifar10": "cifar10",
  "cifar100": "cifar100",
  "food101": "food101",
  "oxford_iiit_pet": "pets",
  "oxford_flowers102": "flowers",
  "dtd": "dtd",
  "eurosat": "eurosat",
  "resisc45": "resisc45",
  "caltech101": "caltech101_vtab",
  "cars196": "cars",
  "sun397": "sun397",
  "svhn_cropped": "svhn",
  "mnist": "mnist",
  "patch_camelyon": "pcam",
  "clevr_count": "clevr_count_all",
  "dsprites_orientation": "dsprites_label_orientation",
  "dsprites_x_position": "dsprites_label_x_position",
  "kitti_distance": "kitti_closest_vehicle_distance",
  "diabetic_retinopathy": "diabetic_retinopathy",
  "smallnorb_azimuth": "smallnorb_label_azimuth",
  "smallnorb_elevation": "smallnorb_label_elevation",
  "voc2007": "voc2007_multilabel",
}


@pytest.mark.slow
def test_names_and_prompts_are_clip_benchmarks():
  pytest.importorskip("clip_benchmark")
  folder = pathlib.Path(importlib.util.find_spec("clip_benchmark").origin).parent / "datasets"
  names = json.loads((folder / "en_classnames.json").read_text())
  prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
  for name, key in PEER.items():
    expected = [text.replace("{c}", "{}") for text in prompts[key.removesuffix("_vtab")]]
    assert list(benchmarks.templates(BENCHMARKS[name])[0]) == expected
    if key in names:
      labels = None if BENCHMARKS[name].label else labels_of(name)
      classes, _ = benchmarks.name_classes(BENCHMARKS[name], labels)
      assert classes == [" ".join(words.split()) for words in names[key]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_smaller_imagenets_have_clip_benchmarks_classes(name):
  pytest.importorskip("clip_benchmark")
  text = (pathlib.Path(importlib.util.find_spec("clip_benchmark").origin).parent / "datasets/builder.py").read_text()
  listed = re.search(rf"{name}_wnids = [\[{{](.*?)[\]}}]", text)[1]
  assert sorted(FILES[name]["subset"]) == sorted(re.findall(r"n\d+", listed)) and len(FILES[name]["subset"]) == 200


@pytest.mark.slow
def test_imagenet_stands_in_torchvisions_order():
  found = importlib.util.find_spec("torchvision")
  if found is None:
    pytest.skip("needs torchvision")
  # Read, not imported: the list is private there.
  text = (pathlib.Path(found.origin).parent / "models/_meta.py").read_text()
  theirs = ast.literal_eval(re.search(r"_IMAGENET_CATEGORIES = (\[.*?\])", text, re.DOTALL)[1])

  ours, _ = benchmarks.name_classes(BENCHMARKS["imagenet"], labels_of("imagenet"))
  words = [{letters(word) for word in name.split()} for name in ours]
  other = [{letters(word) for word in name.split()} for name in theirs]
  shared = {
    shift: np.mean([bool(a & b) for a, b in zip(words, np.roll(other, shift), strict=True)]) for shift in (0, 1, -1)
  }
  # Other words for the same thing, but a shift by one leaves next to nothing.
  assert shared[0] > 0.75 and max(shared[1], shared[-1]) < 0.25
