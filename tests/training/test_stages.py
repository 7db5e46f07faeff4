"""Stages: segments, learning rates and distillation weights as a config lists them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from contrastive_jax.batch import Batch, ImageBatch, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.training import stages
from contrastive_jax.training.curriculum import Rows
from contrastive_jax.training.programs import Programs
from contrastive_jax.training.run import Run


def config(*curriculum, **data):
  made = common.get_config()
  made.total_steps, made.batch_size = 100, 64
  made.model = common.model("clip_ti16", vision={"class_token": False, "pool": "mean", "tubelet": 2})
  made.schedule.warmup_steps = 5
  made.data.sources = {"noto": 1.0}
  made.data.update(data)
  made.curriculum = curriculum
  return made


THREE = (
  common.stage("fixed", 40, size=64, learning_rate=1.0),
  common.stage("native", 30, mode="native", max_tokens=16, rows=3, row_length=32, learning_rate=0.5, warmup_steps=10),
  common.stage("video", 0, size=32, video_share=0.5, video_sources={"clips/a": 1.0}, distillation=(0.5, 0.0)),
)


def test_without_a_curriculum_the_run_is_one_stage_at_the_size_of_the_tower():
  (segment,) = stages.segments_of(config())
  assert segment.steps == 100 and segment.resolution == Resolution.fixed(224) and segment.all_sources() == ("noto",)


def test_stages_become_segments():
  fixed, native, video = stages.segments_of(config(*THREE, pack_pairs=8, text_rows=2, text_row_length=64))
  assert [segment.steps for segment in (fixed, native, video)] == [40, 30, 30]
  assert fixed.resolution == Resolution.fixed(64) and fixed.rows is None and fixed.text_rows == Rows(2, 64)
  assert native.resolution.mode == "native" and native.rows == Rows(3, 32)
  assert video.all_sources() == ("noto", "clips/a") and video.feed("clip").frames == 8


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"total_steps": 60}, "total_steps=60 is not the sum of the curriculum's steps \\(40 \\+ 30 \\+ 0\\)"),
    ({"data.pack_pairs": 0}, "pack_pairs=0 must be at least 1"),
    (
      {"curriculum": (common.stage("v", 0, video_share=0.5),)},
      r"curriculum\.0\.video_share=0\.5 needs clips: name some in curriculum\.0\.video_sources",
    ),
    ({"curriculum": (common.stage("v", 0, mode="nativ", max_tokens=9),)}, "did you mean 'native'"),
    (
      {"curriculum": (common.stage("v", 0, rows=3),)},
      r"curriculum\.0\.rows=3 and curriculum\.0\.row_length=0 go together",
    ),
    (
      {"curriculum": (common.stage("v", 0, mode="native", max_tokens=64, rows=3, row_length=32),)},
      "must fit into a row",
    ),
    ({"model.vision.time_position": "learned", "model.vision.max_time": 3}, "clips of 4 tubelets"),
    ({"model.vision.tubelet": 1}, "tubelet=1 reads single images"),
    ({"model.vision.class_token": True}, "no place in packed rows"),
    ({"model.text.pool": "last"}, "other than 'last'"),
  ],
)
def test_impossible_curricula_are_refused(change, message):
  made = config(*THREE, pack_pairs=8, text_rows=2, text_row_length=64)
  made.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    Run.from_config(made)


def test_each_stage_has_its_factor_and_warm_up_of_the_learning_rate():
  schedule = stages.learning_rate(optax.constant_schedule(2.0), stages.stages_of(config(*THREE, pack_pairs=8)))
  rates = jax.vmap(schedule)(jnp.arange(100))
  warm = np.minimum(1, np.arange(1, 31) / 10)
  np.testing.assert_allclose(rates, np.concatenate([np.full(40, 2.0), 2 * 0.5 * warm, np.full(30, 2.0)]), rtol=1e-6)


def test_the_distillation_weight_falls_within_its_stage():
  weight = jax.vmap(stages.distillation_weight(stages.stages_of(config(*THREE, pack_pairs=8))))(jnp.arange(100))
  np.testing.assert_allclose(weight, np.concatenate([np.ones(70), 0.5 * (1 - np.arange(30) / 30)]), atol=1e-6)


def batch_of(rows):
  image = ImageBatch(jnp.ones((rows, 2, 3), jnp.uint8), jnp.zeros((rows, 2, 3), jnp.int16))
  return Batch(image, TextBatch(jnp.ones((rows, 2), jnp.int32), jnp.ones((rows, 2), bool), jnp.arange(rows)))


def test_one_program_for_each_shape_compiled_before_it_is_needed():
  traced, said = [], []

  def step(state, batch):
    traced.append(batch.image.patches.shape)
    return state + jnp.sum(batch.image.patches, dtype=jnp.int32), {}

  with Programs(jax.jit(step), jnp.int32(0), say=said.append) as programs:
    programs.prepare([batch_of(2), batch_of(3)])
    state = jnp.int32(0)
    for rows in (2, 2, 3, 2, 3, 5):
      state, _ = programs(state, batch_of(rows))
    assert int(state) == 6 * (2 + 2 + 3 + 2 + 3 + 5)
    assert len(programs) == len(said) == len(traced) == 3
  assert "2 image rows of 2 tokens" in said[0]
