"""The list of evaluation sets tells of each what opening it finds."""

import pytest

from contrastive_jax.evaluation.benchmarks import BENCHMARKS
from data import task_list, tasks
from data.sources.formats import FORMATS


@pytest.fixture(scope="module")
def listed():
  return {row.name: row for row in task_list.rows()}


def test_every_named_set_is_listed_with_kind_and_origin(listed):
  others = {"tfds/<set>[@<split>]", "table/<file>[@<split>]", "folder/<folder>[@<split>]"}
  others |= {f"{kind}/<files>[@<split>]" for kind in FORMATS}
  assert set(listed) == {*tasks.EVALUATIONS, *tasks.GROUPS, *BENCHMARKS, *others}
  assert all(row.kind and row.data for row in listed.values())


@pytest.mark.parametrize(
  ("name", "kind", "size"),
  [
    ("emoji_openmoji", "zero-shot classification", "1,853 images, 1,853 classes"),
    ("emoji_heldout", "retrieval", "162 images, 81 captions"),
    ("emoji_openmoji_choices", "hard pairs", "776 images, 388 instances"),
    ("motion_openmoji", "zero-shot classification", "1,853 clips, 9 classes"),
    ("imagenet_a", "zero-shot classification", "200 classes"),
    ("stanford_dogs", "zero-shot classification", ""),
    ("coco_captions", "retrieval", ""),
    ("sugarcrepe", "group", "7 sets"),
  ],
)
def test_kind_and_size(listed, name, kind, size):
  assert (listed[name].kind, listed[name].size) == (kind, size)
