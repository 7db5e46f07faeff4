"""Flags: one spelling, which is also understood with dashes."""

import re

import pytest

from contrastive_jax import cli
from tests import runs

DEFINED = {"find_max_batch", "save_hlo", "topology"}


@pytest.mark.parametrize(
  ("given", "read"),
  [
    ("--find-max-batch", "--find_max_batch"),
    ("--nofind-max-batch", "--nofind_max_batch"),
    ("--save-hlo=a-b.txt", "--save_hlo=a-b.txt"),
    ("--config.batch_size=1-2", "--config.batch_size=1-2"),
    ("--no-such-flag", "--no-such-flag"),
    ("--", "--"),
    ("file-name", "file-name"),
    ("--topology=v5e:2x2", "--topology=v5e:2x2"),
  ],
)
def test_dashes_are_read_as_underscores_in_the_names_of_flags_only(given, read):
  assert cli._underscored([given], DEFINED) == [read]


def test_no_flag_has_a_dash_in_its_name():
  for script in (*runs.ROOT.glob("*.py"), *runs.ROOT.glob("benchmarks/*.py"), *runs.ROOT.glob("data/*.py")):
    names = re.findall(r"DEFINE_\w+\(\s*\"([^\"]+)\"", script.read_text())
    assert not [name for name in names if "-" in name], script
