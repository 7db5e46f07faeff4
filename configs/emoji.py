"""A small dual encoder that learns emoji from their names, in minutes on a laptop: what `make train` runs.

It sees Noto and Twemoji drawings named in 14 languages, and is scored on OpenMoji, a style it has never seen.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  config = common.get_config()
  config.name = "emoji"
  config.total_steps = 800
  config.batch_size = 256
  config.loss = "softmax"
  config.loss_options = ConfigDict({"strategy": "gather"})
  config.compute_dtype = "float32"

  blocks = {"activation": "gelu_tanh", "remat": "none", "scan_unroll": 4}
  config.model = common.model(
    "clip_ti16",
    vision={
      "image_size": 64,
      "patch_size": 16,
      "transformer": {**blocks, "depth": 4},
      "mean": (0.5, 0.5, 0.5),
      "std": (0.5, 0.5, 0.5),
    },
    text={"vocab_size": 4096, "length": 12, "transformer": {**blocks, "depth": 2, "causal": False}, "pool": "mean"},
    embed_dim=192,
  )
  config.optimizer.name = "muon"
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.01
  config.schedule.name = "cosine"
  config.schedule.warmup_steps = 50

  config.data.sources = ConfigDict({"noto": 1.0, "twemoji": 1.0})
  config.data.captions.english = 0.7
  config.data.threads = 2

  config.log_every = 50
  config.checkpoint_every = 200
  config.evals = ("emoji_heldout",)
  config.final_evals = ("emoji_openmoji",)
  config.eval_every = 200
  return config
