"""Flags: one spelling, which is also understood with dashes."""

import pytest
from absl import flags

import plan  # noqa: F401  (defines its flags)
from contrastive_jax import cli


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
  assert cli._underscored([given]) == [read]


def test_no_flag_has_a_dash_in_its_name():
  ours = [name for name in flags.FLAGS if "-" in name]
  assert not [name for name in ours if flags.FLAGS.find_module_defining_flag(name).endswith("plan")]
