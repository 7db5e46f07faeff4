"""The config of the runs in this folder, which an older version began: see `tests/test_stored_runs.py`."""

from ml_collections import ConfigDict

from configs import emoji


def get_config(optimizer: str) -> ConfigDict:
  config = emoji.get_config()
  config.name = "stored"
  config.total_steps = 16
  config.batch_size = 32
  config.model.vision.image_size = 32
  config.model.vision.patch_size = 8
  for tower in (config.model.vision, config.model.text):
    tower.transformer.update({"width": 8, "heads": 2, "mlp_dim": 16, "depth": 1, "drop_path": 0.1})
  config.model.text.vocab_size = 300
  config.model.text.length = 8
  config.model.embed_dim = 8
  config.optimizer.name = optimizer
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.1
  # The bias of the keys has no gradient but rounding, which Adam would turn into steps of full size.
  config.optimizer.eps = 1e-3
  config.schedule.warmup_steps = 4
  config.average_decay = 0.9
  config.log_every = 4
  config.log_sample_ids = True
  config.checkpoint_every = 8
  config.eval_every = 0
  config.evals = ()
  config.final_evals = ()
  return config
