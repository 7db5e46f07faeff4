"""Checkpoints that the tests of this folder copy and damage."""

from pathlib import Path

import pytest

from tests.interop import checkpoints


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, Path]:
  """One small checkpoint of each family; a test writes to a copy."""
  return checkpoints.write_all(tmp_path_factory.mktemp("sources"))
