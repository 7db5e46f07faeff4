"""The run of configs/emoji.py in CLIP's architecture, so that other libraries can open what it learns.

python train.py --config=configs/emoji_clip.py --workdir=runs/emoji_clip
python convert.py --from=runs/emoji_clip --to=huggingface:emoji_clip
"""

from ml_collections import ConfigDict

from configs import emoji


def get_config() -> ConfigDict:
  config = emoji.get_config()
  config.name = "emoji_clip"
  image, text = config.model.image, config.model.text
  image.update({"class_token": True, "pool": "cls", "pre_norm": True, "patch_bias": False})
  text.update({"pool": "eos"})
  for tower in (image, text):
    tower.transformer.update({"activation": "quick_gelu", "norm_eps": 1e-5})
  text.transformer.causal = True
  config.model.init_logit_bias = None
  config.tokenizer.straight_quotes = True
  return config
