"""Whatever made a config, a field that no config has is named together with the field that was meant."""

import copy

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from contrastive_jax import cli
from contrastive_jax.errors import UserError, closest
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.training import config as run_config
from contrastive_jax.training import fields
from contrastive_jax.training.run import Run
from tests import runs

CONFIG = common.get_config()
CONFIG.data.sources = {"noto": 1.0}
SHIPPED = sorted(path.stem for path in (runs.ROOT / "configs").glob("*.py") if "def get_config()" in path.read_text())


def changed(change):
  config = copy.deepcopy(CONFIG)
  change(config)
  return config


def leaves(node, prefix=""):
  """Full names of the parts and leaves of a config, without what is the user's to name."""
  for name, value in node.items():
    full = f"{prefix}{name}"
    yield full
    if isinstance(value, ConfigDict) and full not in ("data.sources", "objective"):
      yield from leaves(value, f"{full}.")


def test_the_table_is_what_configs_have():
  config = {name for name in leaves(CONFIG) if name != "objective"}
  config |= {f"curriculum.{name}" for name, _ in common.stage("a", 1).items()}
  config |= {"model.others.name"}  # The other fields of an entry are those of its tower, and no tower is shipped.
  table = {name for name in fields.names() if not name.startswith("objective")}
  assert table == config


def put(path, value):
  """Sets a field, and makes it first where there is none."""

  def change(config):
    *parents, last = path.split(".")
    for parent in parents:
      config = config[parent]
    config[last] = value

  return change


MISSPELT = {
  "batchsize": (3, "batch_size"),
  "batch": (3, "batch_size"),
  "bs": (3, "batch_size"),
  "lr": (1.0, "optimizer.learning_rate"),
  "image_size": (64, "model.image.image_size"),
  "warmup_steps": (64, "schedule.warmup_steps"),
  "learning_rate": (0.1, "optimizer.learning_rate"),
  "evaluations": (("emoji_openmoji",), "evals"),
  "objectives": ({"sigmoid": 1.0}, "objective"),
  "optimiser": ({"name": "lion"}, "optimizer"),
  "optimizer.lr": (1.0, "learning_rate"),
  "optimizer.wd": (1.0, "weight_decay"),
  "optimizer.epsilon": (1e-8, "eps"),
  "optimizer.clipnorm": (1.0, "clip_norm"),
  "schedule.warmup": (5, "warmup_steps"),
  "schedule.end_faktor": (0.5, "end_factor"),
  "mesh.tensors": (2, "tensor"),
  "tokenizer.lower_case": (True, "lowercase"),
  "distillation.target": ("runs/x", "targets"),
  "data.worker": (2, "workers"),
  "data.source": ({"noto": 1.0}, "sources"),
  "data.captions.engish": (0.5, "english"),
  "data.augment.rotat": (5.0, "rotate"),
  "loss_options.sofmax": ({"tile": 64}, "softmax"),
  "loss_options.softmax.label_smooting": (0.1, "label_smoothing"),
  "model.imgae": ({"image_size": 64}, "image"),
  "model.dtype": ("float32", "compute_dtype"),
  "model.image.imagesize": (64, "image_size"),
  "model.text.transformer.head": (2, "heads"),
  "objective.sigmod": (1.0, "sigmoid"),
  "objective.distill_feature": (1.0, "distill_features"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_field_is_named_with_the_one_that_was_meant(name):
  value, meant = MISSPELT[name]
  for check in (Run.from_config, lambda config: Run.from_config(config).build(MeshSpec().make(jax.devices()[:1]))):
    with pytest.raises(UserError, match=f"has no field '{name}'") as refused:
      check(changed(put(name, value)))
    assert f"did you mean '{meant}'?" in str(refused.value)
  with pytest.raises(UserError, match="no field"):
    Run.from_config(ConfigDict({**CONFIG.to_dict(), "somethingelse": 1}))


@pytest.mark.parametrize(
  ("entry", "meant"),
  [({"stepz": 3}, "steps"), ({"steps": 3, "mod": "fixed"}, "mode"), ({"video_shares": 0.5}, "video_share")],
)
def test_a_misspelt_field_of_a_stage_is_named(entry, meant):
  for stage in (entry, ConfigDict(entry)):
    with pytest.raises(UserError, match=r"has no field 'curriculum\.1\.\w+' \(did you mean '" + meant):
      Run.from_config(changed(put("curriculum", (common.stage("a", 3), stage))))
  with pytest.raises(UserError, match=f"did you mean '{meant}'"):
    common.stage("a", 3, **{[*entry][-1]: 1})


def test_stages_may_be_plain_dictionaries():
  Run.from_config(changed(put("curriculum", ({"name": "a", "steps": 3}, {"name": "b", "learning_rate": 0.5}))))


@pytest.mark.parametrize("sources", [{"noto": 1.0, "wieght": 2.0}, {"my label": {"name": "tfds/x.y:1.0.0"}}])
def test_labels_and_names_of_sources_stay_free(sources):
  Run.from_config(changed(put("data.sources", sources)))
  stages = ({"steps": 9_000, "sources": sources}, {"sources": {"other": 1.0}})
  Run.from_config(changed(put("curriculum", stages)))


@pytest.mark.parametrize(
  ("name", "value", "kind"),
  [
    ("total_steps", None, "a whole number"),
    ("batch_size", None, "a whole number"),
    ("optimizer.learning_rate", None, "a number"),
    ("seed", True, "a whole number"),
    ("name", None, "text"),
    ("evals", None, "a list of texts"),
    ("frozen", (3,), "a list of texts"),
    ("data.augment.zoom", (1.0,), "a list of 2 numbers"),
    ("profile_steps", (1, "2"), "a list of whole numbers"),
    ("objective", {"sigmoid": "1"}, "a number"),
    ("curriculum", ({"steps": 1.5},), "a whole number"),
    ("curriculum", (3,), "a part with the fields"),
    ("model.image.mean", ("a", "b", "c"), "a list of numbers"),
    ("log_sample_ids", None, "True or False"),
  ],
)
def test_a_value_of_another_type_is_one_sentence(name, value, kind):
  with pytest.raises(UserError, match=f"must be {kind}") as refused:
    Run.from_config(changed(put(name, value)))
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
  ("name", "value", "said"),
  [
    ("init_model", "confg", "init_model='confg' is unknown"),
    ("profile_steps", (10**6, 10**6 + 2), "begins after total_steps"),
    ("model.init_logit_scale", 10.0, r"a scale of 2\.203e\+04, .* or raise max_logit_scale"),
    ("model.init_logit_scale", -1.0, "a scale of 0.3679"),
    ("max_logit_scale", 2.0, "updates keep it from 1 to max_logit_scale=2.0"),
    ("optimizer.name", "adam\nw", r"optimizer.name='adam\\nw' is unknown"),
  ],
)
def test_what_no_run_could_do_is_one_sentence(name, value, said):
  with pytest.raises(UserError, match=said) as refused:
    Run.from_config(changed(put(name, value)))
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["optimizer", "schedule", "data", "tokenizer", "distillation"])
def test_a_part_that_was_replaced_whole_lacks_fields(name):
  with pytest.raises(UserError, match=rf"the config lacks {name}\.\w+: start from"):
    Run.from_config(changed(lambda config: config.update({name: {}}) or config.__setitem__(name, {})))


def test_what_is_given_whole_where_defaults_exist_is_taken():
  config = changed(put("data.augment", {"flip": 0.5}))
  config.loss_options = {"sigmoid": {"strategy": "gather"}}
  Run.from_config(config)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_have_known_fields(name):
  config = cli._ConfigFileParser().parse(str(runs.ROOT / "configs" / f"{name}.py"))
  fields.check_fields(run_config.as_json(config))


@pytest.mark.parametrize(
  ("given", "options", "meant"),
  [
    ("lr", ("blur", "learning_rate"), "learning_rate"),
    ("decay", ("b1", "weight_decay"), "weight_decay"),
    ("wieght", ("weight", "height"), "weight"),
    ("Batch-Size", ("batch_size",), "batch_size"),
    ("xyz", ("batch_size",), None),
    ("", ("a",), None),
  ],
)
def test_the_closest_name(given, options, meant):
  assert closest(given, options) == meant
