"""SigLIP B/16 at 224 px (arXiv 2303.15343) at the paper's batch of 32,768, for one v5e-256 slice or 8 to 64 H100s."""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  config = common.get_config()
  config.name = "siglip_b16"
  config.total_steps = 100_000  # 3.3 billion pairs.
  config.batch_size = 32_768
  config.loss = "sigmoid"
  config.model = common.model("siglip_b16")

  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 1e-4
  config.optimizer.b2 = 0.95
  config.schedule.warmup_steps = 5000

  config.tokenizer.spec = "sentencepiece:tokenizer.model"  # Of at most 32,000 tokens; the paper's is C4's.
  config.data.sources = ConfigDict({"tfds/coco_captions": 1.0})  # An example: name your own, and its features.
  config.data.caption_key = "captions"
  return config
