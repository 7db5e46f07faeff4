"""What may differ between the start of a run and its resumption."""

import json

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.training import config as run_config
from tests import tiny


@pytest.fixture
def started(tmp_path):
  """A run directory, and a way to change what it was started with."""
  content = run_config.as_json(tiny.get_config())

  def write(change=lambda content: None):
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path

  return write


def test_a_field_of_the_towers_that_did_not_exist_then_is_at_its_default(started):
  def forget(content):
    del content["model"]["vision"]["resize"], content["model"]["text"]["transformer"]["norm_position"]

  workdir, config = started(forget), tiny.get_config()
  assert not run_config.check_resume(workdir, config)
  config.model.vision.resize = "squash"
  with pytest.raises(UserError, match=r"was started with model\.vision\.resize='crop', not 'squash'"):
    run_config.check_resume(workdir, config)


def test_a_field_of_the_run_that_did_not_exist_then_is_off(started):
  def forget(content):
    del content["tokenizer"]["straight_quotes"]

  workdir, config = started(forget), tiny.get_config()
  assert not run_config.check_resume(workdir, config)
  config.tokenizer.straight_quotes = True
  with pytest.raises(UserError, match=r"tokenizer\.straight_quotes=None, not True"):
    run_config.check_resume(workdir, config)


def test_data_may_change_and_a_run_may_grow_but_nothing_that_it_computes(started):
  workdir, config = started(), tiny.get_config()
  config.total_steps += 1
  config.log_every = 7
  assert not run_config.check_resume(workdir, config)
  config.data.sources = {"noto": 1.0}
  assert run_config.check_resume(workdir, config)
  config.optimizer.learning_rate *= 2
  with pytest.raises(UserError, match=r"optimizer\.learning_rate=0\.001, not 0\.002"):
    run_config.check_resume(workdir, config)
