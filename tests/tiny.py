"""The smallest config that goes through every room of the house."""

from ml_collections import ConfigDict

from configs import emoji


def get_config() -> ConfigDict:
  config = emoji.get_config()
  config.name = "tiny"
  config.total_steps = 40
  config.batch_size = 32
  config.model.image.image_size = 32
  for tower in (config.model.image, config.model.text):
    tower.transformer.update({"width": 32, "heads": 2, "mlp_dim": 64, "depth": 2, "drop_path": 0.1})
  config.model.text.vocab_size = 512
  config.model.text.length = 8
  config.model.embed_dim = 16
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  # The bias of the keys has no gradient but rounding, which Adam would turn into steps of full size.
  config.optimizer.eps = 1e-3
  config.schedule.warmup_steps = 4
  config.average_decay = 0.9
  config.log_every = 1
  config.log_sample_ids = True
  config.checkpoint_every = 8
  config.eval_every = 0
  config.evals = ()
  config.final_evals = ()
  return config
