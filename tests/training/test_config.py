"""What may differ between the start of a run and its resumption."""

import dataclasses
import json
import subprocess
import sys

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.objectives.softmax import Softmax
from contrastive_jax.training import config as run_config
from contrastive_jax.training.run import Run
from tests import tiny


@pytest.fixture
def started(tmp_path):
  """A run directory, and a way to change what it was started with."""
  content = run_config.as_json(tiny.get_config())

  def write(change=lambda content: None):
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "checkpoints" / "8").mkdir(parents=True, exist_ok=True)
    return tmp_path

  return write


def test_a_field_of_the_towers_that_did_not_exist_then_is_at_its_default(started):
  def forget(content):
    del content["model"]["image"]["resize"], content["model"]["text"]["transformer"]["norm_position"]

  workdir, config = started(forget), tiny.get_config()
  assert not run_config.check_resume(workdir, config)
  config.model.image.resize = "squash"
  with pytest.raises(UserError, match=r"was started with model\.image\.resize='crop', not 'squash'"):
    run_config.check_resume(workdir, config)


def test_a_run_that_was_started_out_of_range_is_not_asked_for_its_old_value(started):
  config = tiny.get_config()
  workdir = started(lambda content: content.update(seed=-1))
  with pytest.raises(UserError, match=r"now seed=-1 must be at least 0 .* start a new run from its weights") as told:
    run_config.check_resume(workdir, config)
  assert "give the old value" not in str(told.value)
  # A start that made no checkpoint binds nobody, and its seed is refused all the same.
  (workdir / "checkpoints" / "8").rmdir()
  assert not run_config.check_resume(workdir, config)
  config.seed = -1
  with pytest.raises(UserError, match=r"^seed=-1 must be at least 0 and at most 4294967295$"):
    Run.from_config(config, workdir)


def test_an_option_of_a_loss_that_did_not_exist_then_is_at_its_default(started):
  def forget(content):
    content["loss_options"] = {"softmax": {"strategy": "gather", "label_smoothing": 0.1}}

  workdir, config = started(forget), tiny.get_config()
  config.loss_options.softmax.label_smoothing = 0.1
  assert not run_config.check_resume(workdir, config)
  config.loss_options.distill_similarity.teacher_temperature = 0.1
  with pytest.raises(UserError, match=r"distill_similarity\.teacher_temperature=0\.05, not 0\.1"):
    run_config.check_resume(workdir, config)


def test_every_option_of_a_loss_is_a_field_with_a_type():
  """As the command line sees it."""
  config = tiny.get_config()
  given = {"softmax.tile": 256, "softmax.label_smoothing": 0.2, "distill_similarity.temperature": 0.1}
  config.loss_options.update_from_flattened_dict(given)
  _, term = Run.from_config(config).objective.terms["softmax"]
  others = {"strategy": "gather", "towers": ("image", "text"), "directions": "mean", "hard_captions": 0}
  assert dataclasses.asdict(term).items() >= {"tile": 256, "label_smoothing": 0.2, **others}.items()
  assert dataclasses.asdict(dataclasses.replace(term, tile=None, label_smoothing=0.0)) == dataclasses.asdict(Softmax())
  with pytest.raises(TypeError):
    config.loss_options.softmax.tile = "small"


@pytest.mark.parametrize(
  ("option", "value", "said"),
  [
    ("sigmoid.strategy", "rings", "loss_options.sigmoid.strategy='rings' is unknown"),
    ("distill_similarity.strategy", "", "loss_options.distill_similarity.strategy='' is unknown"),
    ("distill_relational.tile", 0, "loss_options.distill_relational.tile=0 must be at least 1"),
    ("distill_features.distance", "cosin", "cosin"),
  ],
)
def test_the_options_of_losses_that_a_run_does_not_use_are_checked_too(option, value, said):
  config = tiny.get_config()
  assert set(Run.from_config(config).term_weights) == {"softmax"}
  config.loss_options.update_from_flattened_dict({option: value})
  with pytest.raises(UserError, match=said):
    Run.from_config(config)


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


def test_imported_weights_are_no_run_to_resume(started):
  def keep_model(content):
    for name in [*content]:
      if name not in ("name", "model", "compute_dtype"):
        del content[name]

  workdir = started(keep_model)
  with pytest.raises(UserError, match=r"holds imported weights and no run: .*--config\.init_from="):
    run_config.check_resume(workdir, tiny.get_config())


def test_nothing_is_pinned_before_the_first_checkpoint(started):
  workdir, config = started(), tiny.get_config()
  config.batch_size, config.optimizer.name, config.total_steps = 64, "lion", 8
  with pytest.raises(UserError):
    run_config.check_resume(workdir, config)
  (workdir / "checkpoints" / "8").rmdir()
  (workdir / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
  assert not run_config.check_resume(workdir, config)
  (workdir / "config.json").write_text("{")
  assert not run_config.check_resume(workdir, config)


def test_the_config_of_the_checkpoint_decides_and_not_the_file(started):
  """A start with other data or more steps may have ended between the two."""
  workdir, config = started(lambda content: content.update(total_steps=99)), tiny.get_config()
  saved = run_config.as_json(config)
  assert not run_config.check_resume(workdir, config, saved)
  config.data.sources = {"noto": 1.0}
  assert run_config.check_resume(workdir, config, saved)
  config.total_steps -= 1
  with pytest.raises(UserError, match="a run may only grow"):
    run_config.check_resume(workdir, config, saved)


def test_what_is_refused_names_the_way_out(started):
  workdir, config = started(), tiny.get_config()
  config.seed = 3
  with pytest.raises(UserError, match=r"seed=0, not 3: give the old value, or .* --config\.init_from=\S+ and another"):
    run_config.check_resume(workdir, config)


def test_a_config_is_checked_before_jax_starts():
  """Once it has, its devices and processes are fixed, and a plan for eight devices or a second host comes too late."""
  program = """
from jax._src import xla_bridge
import configs.clip_b16, configs.clipa_l16, configs.emoji, configs.emoji_clip, configs.siglip_b16, tests.tiny
from contrastive_jax.training.run import Run
every = configs.clip_b16, configs.clipa_l16, configs.emoji, configs.emoji_clip, configs.siglip_b16, tests.tiny
for source in every:
  Run.from_config(source.get_config())
assert not xla_bridge.backends_are_initialized()
"""
  subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
