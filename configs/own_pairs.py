"""A small dual encoder of pairs of your own, in minutes on a laptop: a folder, a table, or shards of an index.

  python train.py --config=configs/own_pairs.py:photos/captions.csv --workdir=runs/photos
  python train.py --config=configs/own_pairs.py:photos --workdir=runs/photos
  python train.py --config='configs/own_pairs.py:webdataset/photos/{000..004}.tar' --workdir=runs/photos
  python train.py --config=configs/own_pairs.py:photos --workdir=runs/tuned --config.init_from=runs/imported

The table has a column with the paths of the pictures and one with their captions, called "image" and "caption" unless
--config.data.image_key and --config.data.caption_key say otherwise. In a folder, captions stand in `dog.txt` beside
`dog.jpg`, or each folder in it is a class. Shards are named with their kind, and `python -m data.index` has indexed
them. A tenth of the pictures is held out, and the run is scored on it. With
weights to start from, the model is theirs, and the learning rate should be some hundred times lower.
"""

import math

from ml_collections import ConfigDict

from configs import common
from contrastive_jax import paths
from contrastive_jax.errors import UserError
from data.sources.formats import FORMATS


def get_config(place: str = "") -> ConfigDict:
  if not place:
    raise UserError("name a table or a folder behind the config file, as in configs/own_pairs.py:photos/captions.csv")
  kind, _, rest = place.partition("/")
  if kind in FORMATS:
    place = rest
  else:
    kind = "folder" if paths.typed("the place of the pairs", place).is_dir() else "table"

  config = common.get_config()
  config.name = "own_pairs"
  config.total_steps = 500
  config.batch_size = 64
  config.loss = "softmax"
  config.compute_dtype = "float32"  # On CPUs; accelerators are faster with bfloat16.

  blocks = {"width": 192, "depth": 4, "heads": 3, "mlp_dim": 768}
  config.model = common.model(
    "siglip_b16",
    image={"image_size": 96, "transformer": blocks},
    text={"transformer": {**blocks, "depth": 2}, "vocab_size": 4096, "length": 32},
    embed_dim=192,
    init_logit_scale=math.log(14),
  )
  config.init_model = "init_from"
  config.optimizer.weight_decay = 0.05
  config.schedule.warmup_steps = 50

  # Names may hold dots, and so stand as values.
  config.data.sources = ConfigDict({"own": {"name": f"{kind}/{place}@train", "weight": 1.0}})
  config.data.augment.zoom = (1.0, 1.25)
  config.data.augment.flip = 0.5
  config.data.threads = 2

  config.checkpoint_every = 100
  config.evals = (f"{kind}/{place}@test",)
  return config
