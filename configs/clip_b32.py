"""CLIP B/32 at 224 px (arXiv 2103.00020) at the paper's batch of 32,768, for one v5e-256 slice or 8 to 64 H100s."""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  config = common.get_config()
  config.name = "clip_b32"
  config.total_steps = 390_625  # 32 epochs of 400 million pairs.
  config.batch_size = 32_768
  config.loss = "softmax"
  config.model = common.model("clip_b32")

  # Tables 19 and 20 of the paper.
  config.optimizer.learning_rate = 5e-4
  config.optimizer.weight_decay = 0.2
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.98
  config.optimizer.eps = 1e-6
  config.optimizer.clip_norm = 0.0
  config.schedule.warmup_steps = 2000

  config.tokenizer.spec = "clip:bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges.
  config.data.sources = ConfigDict({"tfds/coco_captions": 1.0})  # An example: name your own, and its features.
  config.data.caption_key = "captions"
  return config
