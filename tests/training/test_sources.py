"""Sources of a config: a mapping of names to weights, or entries that hold the name as a value."""

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.schedule.stages import weighted_sources


def test_names_with_dots_are_values_beside_names_that_are_keys():
  given = {
    "noto": 2,
    "coco": {"name": "tfds/coco:1.1.0", "weight": 0.5},
    "big": {"name": "tfds/name/big.v2@train[:10%]"},
    "mine": {"name": "clips//data/v1.0/clips"},
  }
  assert weighted_sources("data.sources", given) == (
    ("clips//data/v1.0/clips", 1.0),
    ("noto", 2),
    ("tfds/coco:1.1.0", 0.5),
    ("tfds/name/big.v2@train[:10%]", 1.0),
  )


@pytest.mark.parametrize(
  ("entry", "said"),
  [
    ({"nam": "a"}, "has no name"),
    ({"weight": 1.0}, "has no name"),
    ({"name": ""}, "has no name"),
    ({"name": 3}, "has no name"),
    ({"name": "a", "weight": 0}, "above 0"),
    ({"name": "a", "weight": "1"}, "above 0"),
    ({"name": "a", "weight": True}, "above 0"),
    ({"name": "noto"}, "twice"),
    (-1.0, "above 0"),
    (float("nan"), "above 0"),
    (float("inf"), "above 0"),
    (None, "above 0"),
  ],
)
def test_other_entries_are_refused(entry, said):
  with pytest.raises(UserError, match=said):
    weighted_sources("data.sources", {"noto": 1.0, "label": entry})
