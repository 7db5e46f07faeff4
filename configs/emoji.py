"""A small dual encoder that learns emoji from their names, in minutes on a laptop: what `make train` runs.

It sees Noto and Twemoji drawings named in 14 languages, and is scored on OpenMoji, a style it has never seen.
"""

import math

from ml_collections import ConfigDict

from configs import common
from data import augment


def get_config() -> ConfigDict:
  config = common.get_config()
  config.name = "emoji"
  config.total_steps = 1000
  config.batch_size = 256
  config.loss = "softmax"
  config.loss_options.softmax.label_smoothing = 0.1
  config.compute_dtype = "float32"

  blocks = {"activation": "gelu_tanh", "norm_eps": 1e-6, "remat": "dots"}
  config.model = common.model(
    "clip_ti16",
    image={
      "image_size": 64,
      "patch_size": 16,
      "transformer": {**blocks, "width": 128, "depth": 4, "heads": 2, "mlp_dim": 512},
      "class_token": False,
      "pool": "mean",
      "pre_norm": False,
      "patch_bias": True,
      "mean": (0.5, 0.5, 0.5),
      "std": (0.5, 0.5, 0.5),
    },
    text={
      "transformer": {**blocks, "width": 128, "depth": 1, "heads": 2, "mlp_dim": 512, "causal": False},
      "vocab_size": 4096,
      "length": 12,
      "pool": "mean",
    },
    init_logit_scale=math.log(25),
    init_logit_bias=-8.0,  # For --config.loss=sigmoid; the softmax does not see it.
  )
  config.optimizer.name = "muon"
  config.optimizer.learning_rate = 3e-3
  config.optimizer.muon_learning_rate = 0.012
  config.optimizer.b2 = 0.98
  config.optimizer.weight_decay = 0.05
  config.schedule.name = "cosine"
  config.schedule.warmup_steps = 50
  config.schedule.end_factor = 0.01

  # Skin tones are many drawings of few concepts: they get 15% of the draws.
  config.data.sources = ConfigDict({"noto": 0.425, "twemoji": 0.425, "noto_tones": 0.075, "twemoji_tones": 0.075})
  config.data.captions.english = 0.95
  config.data.augment = common.as_config(augment.DRAWINGS)
  config.data.threads = 2

  config.checkpoint_every = 250
  config.evals = ("emoji_heldout",)
  config.final_evals = ("emoji_openmoji",)
  return config
