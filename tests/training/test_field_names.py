"""What is wrong with a config is said with the whole names of its fields, which can be typed after `--config.`."""

import re

import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.training.fields import names
from contrastive_jax.training.run import Run


def stage(**fields):
  return {"curriculum": (common.stage("low", 10), common.stage("high", 0, **fields))}


def clips(**fields):
  return {"model.image.tubelet": 2} | stage(**{"video_share": 0.5, "video_sources": {"clips/a": 1}} | fields)


WRONG = [
  {"model.image.transformer.heads": 5},
  {"model.text.transformer.heads": 7},
  {"model.image.transformer.activation": "relu"},
  {"model.text.transformer.norm": "batchnorm"},
  {"model.text.transformer.attention": "sigmoid"},
  {"model.image.transformer.attention_length": 9},
  {"model.image.transformer.rope": "2d", "model.image.transformer.heads": 256},
  {"model.image.transformer.rope": "3d", "model.image.transformer.heads": 96},
  {"model.text.transformer.rope": "2d"},
  {"model.image.image_size": 8},
  {"model.image.std": (0.5,)},
  {"model.image.mean": (0.5, 0.5)},
  {"model.image.pool": "cls"},
  {"model.image.pool": "max"},
  {"model.text.pool": "max"},
  {"model.image.position": "sincos2d", "model.image.transformer.width": 6, "model.image.transformer.heads": 1},
  {"model.embed_dim": 7},
  {"model.text.projection": False, "model.embed_dim": 7, "model.image.projection": True},
  {"loss": "clip"},
  {"data.text_rows": 3},
  {"data.pack_pairs": 7},
  {"schedule.warmup_steps": 2000},
  {"schedule.cooldown_steps": 3},
  {"loss": "individual_temperatures", "loss_options.individual_temperatures.temperature": 9.0},
  stage(mode="square"),
  stage(mode="native", min_tokens=9, max_tokens=4),
  stage(mode="naflex"),
  stage(mode="naflex", lengths=(9, 0)),
  stage(rows=3),
  stage(sources={"a": {"name": "b", "weight": 0}}),
  stage(batch_size=12) | {"data.pack_pairs": 8},
  {"curriculum": (common.stage("low", 0), common.stage("high", 0))},
  stage(video_share=0.5),
  stage(video_share=0.5, video_sources={"clips/a": 1}),
  clips(frames=3),
  clips(frames=0),
  clips(frame_rule="first"),
  clips(frame_rule="fps"),
  clips(video_rows=3),
  clips(video_sources={"a": {"name": "b", "weight": -1}}),
]


@pytest.mark.parametrize("change", WRONG, ids=lambda change: " ".join(change))
def test_fields_are_called_by_their_whole_names(change):
  config = common.get_config()
  config.total_steps, config.data.sources = 1000, {"noto": 1.0}
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError) as refused:
    Run.from_config(config)
  said = str(refused.value)
  # A number stands where the table of names has an item of a list.
  fields = [re.sub(r"curriculum\.\d+", "curriculum", field) for field in re.findall(r"([a-z_][\w.]+)=", said)]
  known = {*names(), "curriculum.sources.a.weight", "curriculum.video_sources.a.weight"}
  assert "\n" not in said and (fields or "curriculum.1." in said), said
  assert set(fields) <= known, said
