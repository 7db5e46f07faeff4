"""UniViTAR's training paradigm in minutes on a laptop: fixed resolution, then native, then images and clips in turn.

Emoji at 64 pixels first; then strips of two to five emoji in a row or a column, each at its own size, packed; then
clips of emoji in motion between them. The model that `make train` leaves in runs/emoji teaches it, ever less. The small
tower has the blocks of UniViTAR, with patches of 8 pixels in place of 14.
"""

import math

from ml_collections import ConfigDict

from configs import common, emoji

NATIVE = {"mode": "native", "min_tokens": 16, "max_tokens": 96, "rows": 12, "row_length": 256}


def get_config() -> ConfigDict:
  config = emoji.get_config()
  config.name = "univitar_emoji"
  config.total_steps = 900
  config.batch_size = 128
  small = {"width": 128, "depth": 4, "heads": 2, "remat": "dots"}
  config.model = common.model(
    "univitar_0.3b",
    image={
      "image_size": 64,
      "patch_size": 8,
      "pool": "mean",
      "transformer": {**small, "mlp_dim": 344, "rope": "3d"},
      "mean": (0.5, 0.5, 0.5),
      "std": (0.5, 0.5, 0.5),
    },
    text={
      "transformer": {**small, "depth": 2, "mlp_dim": 512},
      "vocab_size": 4096,
      "length": 24,
      "pool": "mean",
      "projection_bias": False,
    },
    embed_dim=192,
    init_logit_scale=math.log(25),
    init_logit_bias=-8.0,
  )
  config.loss = "sigmoid"
  config.objective = ConfigDict({"sigmoid": 1.0, "distill_features": 1.0})
  config.distillation.teacher = "runs/emoji"

  config.data.pack_pairs = 32
  config.data.text_rows = 6
  config.data.text_row_length = 48
  config.curriculum = (
    common.stage("fixed", 450, size=64, distillation=(1.0, 0.5)),
    common.stage(
      "native",
      200,
      sources={"noto": 0.25, "twemoji": 0.25, "strips_noto": 0.25, "strips_twemoji": 0.25},
      distillation=(0.5, 0.0),
      **NATIVE,
    ),
    common.stage(
      "video",
      250,
      sources={"noto": 0.25, "twemoji": 0.25, "strips_noto": 0.25, "strips_twemoji": 0.25},
      distillation=(0.0, 0.0),
      video_share=0.5,
      video_sources={"motion_noto": 0.5, "motion_twemoji": 0.5},
      frames=4,
      frame_rule="uniform",
      video_size=48,
      **NATIVE,
    ),
  )
  config.checkpoint_every = 150
  config.evals = ("emoji_heldout", "strips_heldout", "motion_heldout")
  config.final_evals = ("emoji_openmoji", "strips_openmoji", "motion_openmoji", "motion_openmoji_still")
  return config
