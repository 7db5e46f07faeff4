"""Stages: the segments that a config's curriculum becomes, and what is refused."""

import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule import stages
from contrastive_jax.schedule.segments import Rows
from contrastive_jax.training.run import Run


def config(*curriculum, **data):
  made = common.get_config()
  made.total_steps, made.batch_size = 100, 64
  made.model = common.model("clip_ti16", image={"class_token": False, "pool": "mean", "tubelet": 2})
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
  assert video.all_sources() == ("noto", "clips/a") and video.inputs("clip").frames == 8


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
    ({"model.image.time_position": "learned", "model.image.max_time": 3}, "clips of 4 tubelets"),
    ({"model.image.tubelet": 1}, "tubelet=1 reads single images"),
    ({"model.image.class_token": True}, "no place in packed rows"),
    (
      {"curriculum": (common.stage("v", 0, size=3),)},
      r"size=3 of stage 'v' is less than model\.image\.patch_size=\d+: use",
    ),
    ({"model.text.pool": "last"}, "other than 'last'"),
  ],
)
def test_impossible_curricula_are_refused(change, message):
  made = config(*THREE, pack_pairs=8, text_rows=2, text_row_length=64)
  made.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    Run.from_config(made)
