"""The smallest run with every kind of stage: fixed, native and packed, then images and clips in turn, and a teacher."""

from ml_collections import ConfigDict

from configs import common, univitar_emoji
from tests import tiny


def get_config() -> ConfigDict:
  config = tiny.get_config()
  config.name = "tiny_stages"
  config.total_steps = 16
  config.batch_size = 16
  staged = univitar_emoji.get_config()
  config.model = staged.model
  for tower in (config.model.image, config.model.text):
    tower.transformer.update({"width": 32, "heads": 2, "mlp_dim": 48, "depth": 2, "drop_path": 0.1})
  config.model.image.image_size = 32
  config.model.text.vocab_size = 512
  config.model.embed_dim = 24
  config.loss = "sigmoid"
  config.objective = ConfigDict({"sigmoid": 1.0, "distill_features": 1.0})
  config.data.pack_pairs = 8
  config.data.text_rows = 3
  config.data.text_row_length = 48
  native = {"mode": "native", "min_tokens": 4, "max_tokens": 32, "rows": 3, "row_length": 64}
  strips = {"noto": 0.5, "strips_noto": 0.5}
  config.curriculum = (
    common.stage("fixed", 5, size=32),
    common.stage("native", 5, sources=strips, distillation=(1.0, 0.0), **native),
    common.stage(
      "video",
      6,
      sources=strips,
      distillation=(0.0, 0.0),
      video_share=0.5,
      video_sources={"motion_noto": 1.0},
      frames=4,
      video_size=32,
      **native,
    ),
  )
  config.checkpoint_every = 4
  return config
