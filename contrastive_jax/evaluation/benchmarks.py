"""Standard benchmarks by name: their data, their labels, and the words put to the model.

Class names and prompts are data, in `classes/`, and follow CLIP_benchmark wherever it has the set, so that numbers can
be compared. Names are keyed by the labels of TFDS, never by position: a set prepared with its labels in another order
is still named right. Splits and derived labels follow VTAB (Zhai et al. 2019) where it has the task.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from contrastive_jax.errors import UserError

GENERIC_TEMPLATES = ("a photo of a {}.",)
GENERIC = "generic: the set has no prompts of its own"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One evaluation.

  Attributes:
    name: name of the benchmark for `--tasks`.
    tfds: the TFDS set with its configuration; "" for a folder of pictures of that name.
    split: the split that is scored, in TFDS's notation.
    train: the split that a probe may learn from; it shares no record with `split`.
    kind: the kind of measurement. "multilabel" reads a sequence of classes, "retrieval" a sequence of captions,
      "choices" captions of which one is true.
    image_key: feature of the picture or the clip.
    label_key: feature of the class or the captions, or the one that `label` derives the class from.
    label: a function from the feature to the class, where the set does not store it.
    classes: file in `classes/` with the names; "" for those of the set, "_" read as a space.
    subset: file in `classes/` with the labels that exist in the set; "" for all.
    templates: file in `classes/` with the prompts; "" where none are published, which makes them `GENERIC_TEMPLATES`.
    pixel_scale: factor of the stored pixels.
  """

  name: str
  tfds: str
  split: str = "test"
  train: str = "train"
  kind: Literal["classification", "multilabel", "retrieval", "choices"] = "classification"
  image_key: str = "image"
  label_key: str = "label"
  label: Callable[[Any], int] | None = None
  classes: str = ""
  subset: str = ""
  templates: str = ""
  pixel_scale: int = 1


def clevr_count(objects: Mapping[str, Any]) -> int:
  """Returns the class of the number of objects, from three to ten, as VTAB's count_all does."""
  return len(objects["size"]) - 3


def kitti_distance(objects: Mapping[str, Any]) -> int:
  """Returns the class of the nearest car, van or truck: up to 8 m away, up to 20 m, farther, or none in sight.

  Args:
    objects: "type" `[objects]`, of which 0 to 2 are those vehicles, and "location" `[objects, 3]`, `(x, y, z)` in
      metres from the camera.

  Follows VTAB's closest_vehicle_distance.
  """
  vehicle = np.asarray(objects["type"]) < 3
  depth = np.asarray(objects["location"], np.float64).reshape(-1, 3)[vehicle, 2]
  return int(np.searchsorted([8.0, 20.0, 999.0], min(depth, default=1000.0)))


def dsprites_orientation(label: int) -> int:
  """Returns one of VTAB's 16 classes of TFDS's 40 orientations."""
  return int(label // 2.5)


def dsprites_x_position(label: int) -> int:
  """Returns one of VTAB's 16 classes of TFDS's 32 positions."""
  return int(label) // 2


def _worded(name: str, tfds: str, file: str, **fields: Any) -> Benchmark:
  """Makes a benchmark whose class names and prompts are in one file."""
  return Benchmark(name, tfds, classes=file, templates=file, **fields)


# Eighty per cent to learn from, twenty to score: VTAB's cut of sets that come in one piece.
_CUT = {"split": "train[80%:]", "train": "train[:80%]"}

BENCHMARKS: dict[str, Benchmark] = {
  benchmark.name: benchmark
  for benchmark in (
    # The labels of the test split are not public.
    _worded("imagenet", "imagenet2012", "imagenet", split="validation"),
    _worded("imagenet_v2", "imagenet_v2/matched-frequency", "imagenet"),
    _worded("imagenet_a", "imagenet_a", "imagenet", subset="imagenet_a"),
    _worded("imagenet_r", "imagenet_r", "imagenet", subset="imagenet_r"),
    _worded("imagenet_sketch", "imagenet_sketch", "imagenet"),
    Benchmark("cifar10", "cifar10", templates="cifar"),
    Benchmark("cifar100", "cifar100", templates="cifar"),
    Benchmark("food101", "food101", split="validation", templates="food101"),
    _worded("oxford_iiit_pet", "oxford_iiit_pet", "oxford_iiit_pet"),
    _worded("oxford_flowers102", "oxford_flowers102", "oxford_flowers102"),
    Benchmark("dtd", "dtd", templates="dtd"),
    _worded("eurosat", "eurosat/rgb", "eurosat", **_CUT),
    Benchmark("resisc45", "resisc45", templates="resisc45", **_CUT),
    _worded("caltech101", "caltech101", "caltech101"),
    Benchmark("cars196", "cars196", templates="cars196"),
    Benchmark("stanford_dogs", "stanford_dogs", classes="imagenet"),
    _worded("sun397", "sun397/tfds", "sun397"),
    _worded("svhn_cropped", "svhn_cropped", "svhn_cropped"),
    _worded("mnist", "mnist", "mnist"),
    _worded("patch_camelyon", "patch_camelyon", "patch_camelyon"),
    _worded("clevr_count", "clevr", "clevr_count", split="validation", label_key="objects", label=clevr_count),
    _worded(
      "dsprites_orientation",
      "dsprites",
      "dsprites_orientation",
      split="train[90%:]",
      train="train[:90%]",
      label_key="label_orientation",
      label=dsprites_orientation,
      pixel_scale=255,
    ),
    _worded(
      "dsprites_x_position",
      "dsprites",
      "dsprites_x_position",
      split="train[90%:]",
      train="train[:90%]",
      label_key="label_x_position",
      label=dsprites_x_position,
      pixel_scale=255,
    ),
    _worded("kitti_distance", "kitti", "kitti_distance", label_key="objects", label=kitti_distance),
    _worded("diabetic_retinopathy", "diabetic_retinopathy_detection/btgraham-300", "diabetic_retinopathy"),
    _worded("smallnorb_azimuth", "smallnorb", "smallnorb_azimuth", split="test[50%:]", label_key="label_azimuth"),
    _worded("smallnorb_elevation", "smallnorb", "smallnorb_elevation", split="test[50%:]", label_key="label_elevation"),
    # Objects marked as difficult count, as in CLIP_benchmark's voc2007_multilabel.
    Benchmark("voc2007", "voc/2007", kind="multilabel", label_key="labels", templates="voc2007"),
    # Karpathy and Li's (2015) test images, 5,000 and 1,000, with all their captions.
    Benchmark("coco_captions", "coco_captions/2014", kind="retrieval", label_key="captions"),
    Benchmark("flickr30k", "", kind="retrieval"),
    *(
      Benchmark(f"sugarcrepe/{subset}", "", kind="choices")
      for subset in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    ),
    Benchmark("winoground", "", kind="choices"),
    _worded("ucf101", "ucf101/ucf101_1", "ucf101", image_key="video"),
  )
}


def templates(benchmark: Benchmark) -> tuple[tuple[str, ...], str]:
  """Returns the prompts, and who wrote them: `GENERIC` where nobody did for this set."""
  if not benchmark.templates:
    return GENERIC_TEMPLATES, GENERIC
  content = _read(benchmark.templates)
  return tuple(content["templates"]), content["templates_source"]


def name_classes(benchmark: Benchmark, labels: Sequence[str] | None) -> tuple[list[str], Int[np.ndarray, "labels"]]:
  """Returns the class names put to the model, and the class of each label: -1 where the benchmark leaves it out.

  Args:
    benchmark: an entry of the table.
    labels: names of the labels in the prepared set, in its order; None if `benchmark.label` makes them.

  Raises:
    UserError: if the set has a label without a name.
  """
  names = _read(benchmark.classes)["classes"] if benchmark.classes else [label.replace("_", " ") for label in labels]
  if isinstance(names, Mapping):
    # TFDS calls the dogs "n02085620-chihuahua"; ImageNet has their names by what stands before the dash.
    keys = [label if label in names else label.partition("-")[0] for label in labels]
    unnamed = next((label for label, key in zip(labels, keys, strict=True) if key not in names), None)
    if unnamed is not None:
      raise _unlike(benchmark, f"a label {unnamed!r} that has no name there")
    names = [names[key] for key in keys]
  elif labels is not None and benchmark.label is None and len(labels) != len(names):
    raise _unlike(benchmark, f"{len(labels)} labels, not {len(names)}")
  if not benchmark.subset:
    return list(names), np.arange(len(names))
  subset = frozenset(_read(benchmark.subset)["subset"])
  kept = np.array([label in subset for label in labels])
  return [name for name, keep in zip(names, kept, strict=True) if keep], np.where(kept, np.cumsum(kept) - 1, -1)


def class_count(benchmark: Benchmark) -> int | None:
  """Returns the number of classes put to the model; None where only the prepared set has their names."""
  if benchmark.subset:
    return len(_read(benchmark.subset)["subset"])
  # A file that was made for another set, as ImageNet's for the dogs, names more classes than this set has.
  own = benchmark.classes and benchmark.classes == benchmark.templates
  return len(_read(benchmark.classes)["classes"]) if own else None


def _unlike(benchmark: Benchmark, what: str) -> UserError:
  return UserError(
    f"the benchmark {benchmark.name!r} does not know this TFDS set {benchmark.tfds!r}, which has {what}: prepare it "
    f"with the TFDS that is installed, or score it as tfds/{benchmark.tfds}"
  )


@functools.cache
def _read(file: str) -> dict[str, Any]:
  return json.loads((Path(__file__).parent / "classes" / f"{file}.json").read_text(encoding="utf-8"))
