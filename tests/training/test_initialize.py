"""Starting from a run whose image tower has other patches: what can be adapted is, and said; the rest is refused."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.models import presets
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.training import config as run_config
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.initialize import initial_state, with_initial_model
from contrastive_jax.training.run import Run
from contrastive_jax.training.state import StateSpec

SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24}


def make_spec(length=5, **vision):
  model = presets.resolve(
    "siglip_ti16",
    {
      "image": {"image_size": 16, "patch_size": 4, "transformer": SMALL, **vision},
      "text": {"transformer": SMALL, "vocab_size": 11, "length": length},
      "embed_dim": 16,
    },
  )
  rules = MeshSpec()
  return StateSpec(model, optax.sgd(1.0), frozen=(), average=False, mesh=rules.make(jax.devices()[:1]), rules=rules)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of an image tower of 4x4 patches of 4 pixels, and its parameters."""
  workdir, spec = tmp_path_factory.mktemp("run"), make_spec()
  state = spec.create(seed=1)
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(state, {})
    checkpoints.wait()
  fields = dataclasses.asdict(spec.model)
  fields.pop("dtype")
  (workdir / "config.json").write_text(json.dumps({"model": fields, "compute_dtype": "float32"}))
  return workdir, jax.device_get(state.params)


def started(spec, workdir, **options):
  said = []
  return jax.device_get(initial_state(spec, seed=2, init_from=str(workdir), say=said.append, **options).params), said


def test_equal_towers_are_taken_without_a_word(run):
  workdir, params = run
  taken, said = started(make_spec(), workdir)
  jax.tree.map(np.testing.assert_array_equal, taken, params)
  assert not said


def test_larger_patches_and_clips_keep_embeddings(run, rng):
  workdir, params = run
  taken, said = started(make_spec(patch_size=8, image_size=32, tubelet=2), workdir)
  assert len(said) == 1 and "from 4 px to 8 px, 2 frames" in said[0]
  patch = rng.standard_normal((4, 4, 3), np.float32)
  enlarged = np.asarray(jax.image.resize(patch, (8, 8, 3), "bilinear")).reshape(-1)
  wanted = patch.reshape(-1) @ params["image"]["patch_embedding"]["kernel"]
  found = np.tile(enlarged, 2) @ taken["image"]["patch_embedding"]["kernel"]
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  for tree in (params, taken):
    del tree["image"]["patch_embedding"]["kernel"]
  jax.tree.map(np.testing.assert_array_equal, taken, params)


def test_a_finer_grid_resizes_the_position_table(run):
  workdir, params = run
  taken, said = started(make_spec(image_size=32), workdir, towers="image")
  assert len(said) == 1 and "from 4x4 to 8x8 patches" in said[0]
  table = params["image"]["position"].reshape(4, 4, -1)
  expected = jax.image.resize(table, (8, 8, table.shape[-1]), "linear").reshape(64, -1)
  np.testing.assert_allclose(taken["image"]["position"], expected, atol=1e-5)


def test_positions_that_captions_never_reach_are_left_out(run):
  workdir, params = run
  taken, said = started(make_spec(length=3), workdir, towers="text")
  assert said == [f"Took the first 3 of the 5 text positions of {workdir}."]
  np.testing.assert_array_equal(taken["text"]["position"], params["text"]["position"][:3])
  with pytest.raises(UserError, match=r"text/position is \[5, 16\] there and \[8, 16\] here"):
    started(make_spec(length=8), workdir, towers="text")


def test_what_cannot_be_adapted_is_named(run):
  workdir, _ = run
  with pytest.raises(UserError, match=r"image/time_position is missing there; .*mlp/up/kernel is \[1, 16, 24\] there"):
    started(make_spec(tubelet=2, time_position="learned", transformer={**SMALL, "mlp_dim": 32}), workdir)


@pytest.fixture
def imported(tmp_path):
  """Weights of a small CLIP, as far as their config goes."""
  config = common.get_config()
  config.model = common.model("clip_ti16", image={"image_size": 32}, text={"vocab_size": 99})
  (tmp_path / "config.json").write_text(json.dumps(run_config.as_json(config)))
  (tmp_path / "checkpoints" / "0").mkdir(parents=True)
  return tmp_path, config.model


def config_from(workdir, **changes):
  config = common.get_config()
  config.init_from = str(workdir)
  config.data.sources = {"noto": 1.0}
  config.update_from_flattened_dict(changes)
  return config.lock()


def test_weights_bring_their_model(imported):
  workdir, model = imported
  said = []
  config = with_initial_model(config_from(workdir), say=said.append)
  assert json.loads(config.model.to_json()) == json.loads(model.to_json())
  assert said == [f"The model is that of init_from={workdir}; init_model='config' keeps the one of the config."]
  Run.from_config(config)


@pytest.mark.parametrize(
  "changes",
  [{"init_model": "config"}, {"model.image.patch_size": 8}, {"model.text.length": 16, "init_towers": "text"}],
)
def test_a_model_that_the_config_says_is_kept(imported, changes):
  config = config_from(imported[0], **changes)
  assert with_initial_model(config) is config


def test_a_model_is_taken_where_that_is_asked_for(imported):
  workdir, model = imported
  config = with_initial_model(config_from(workdir, **{"init_model": "init_from", "model.image.patch_size": 8}))
  assert config.model.image.patch_size == model.image.patch_size and config.model.text.vocab_size == 99


@pytest.mark.parametrize(("tower", "part", "other"), [("image", "image", "text"), ("text", "text", "image")])
def test_a_tower_brings_its_own_part(imported, tower, part, other):
  workdir, model = imported
  config, plain = with_initial_model(config_from(workdir, init_towers=tower)), common.get_config()
  assert json.loads(config.model[part].to_json()) == json.loads(model[part].to_json())
  assert json.loads(config.model[other].to_json()) == json.loads(plain.model[other].to_json())
  assert config.model.embed_dim == model.embed_dim and config.model.init_logit_bias == plain.model.init_logit_bias


def test_a_resumed_run_keeps_its_model_though_the_weights_are_gone(imported, tmp_path):
  workdir, model = imported
  config, said = config_from(tmp_path / "gone"), []
  resumed = with_initial_model(config, workdir, said.append)
  assert json.loads(resumed.model.to_json()) == json.loads(model.to_json()) and not said
  with pytest.raises(UserError, match="init_from="):
    with_initial_model(config, tmp_path / "new")


def test_an_unknown_choice_is_refused(imported):
  with pytest.raises(UserError, match="did you mean 'config'"):
    with_initial_model(config_from(imported[0], init_model="confg"))


def test_many_misfits_are_counted(run):
  workdir, _ = run
  with pytest.raises(
    UserError, match=r"and \d+ more; to take its model as well, set init_model='init_from'"
  ) as refused:
    started(make_spec(transformer={**SMALL, "width": 24}, projection=True), workdir)
  assert str(refused.value).count(";") == 9
