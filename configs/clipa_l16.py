"""CLIPA (arXiv 2305.07017) for an L/16: few tokens of image and text first, then larger images and longer captions.

The stages are those of CLIPA-v2 (arXiv 2306.15658) and of its code for an H/14: 12.8 billion pairs of small images with
captions of 8 tokens, 512 million at 224 px with 32 tokens and without 30% of the patches, 128 million at 336 px without
40%. The first one learns with a rate of 8e-6 for each 256 pairs. The towers have the sizes of CLIP's L.

Here it differs:

- The small images of the paper have 84 px, 6 x 6 patches of 14 px. Patches of 16 px make 96 px of as many.
- One cosine falls over all stages, where the code has one for each. It comes to 6.0e-5 at the second and to 6.8e-6 at
  the third, which there begin with 5.1e-5 and 6.4e-6. The moments of AdamW go on, and there they begin anew.
- Captions are cut at their end. The code keeps nouns before other words while it reads 8 tokens.
- Colours are not changed, as in the code for an L/16, which ends at 224 px.
"""

from ml_collections import ConfigDict

from configs import clip_b32, common


def get_config() -> ConfigDict:
  config = clip_b32.get_config()
  config.name = "clipa_l16"
  config.total_steps = 219_500
  config.batch_size = 65_536
  transformer = {"activation": "gelu_tanh", "norm_eps": 1e-6}
  config.model = common.model(
    "clip_l14",
    image={
      "image_size": 336,
      "patch_size": 16,
      "patch_bias": True,
      "position": "sincos2d",  # No table, of which the first stage would train a few rows.
      "class_token": False,
      "pre_norm": False,
      "pool": "mean",
      "mean": (0.485, 0.456, 0.406),
      "std": (0.229, 0.224, 0.225),
      "resize": "squash",
      "interpolation": "bilinear",
      "transformer": transformer,
    },
    text={
      "length": 32,
      "vocab_size": 30_522,
      "attend_padding": True,
      "pool": "last",
      "transformer": {**transformer, "causal": False},
    },
  )
  config.mesh.fsdp = 8

  config.optimizer.learning_rate = 8e-6 * 256
  config.optimizer.b2 = 0.95
  config.schedule.warmup_steps = 800

  config.tokenizer.spec = "file:tokenizer.json"  # BERT's, which lowers capitals.
  config.data.augment.zoom = (1.0, 1.58)  # Crops of at least 40% of the area,
  config.data.augment.stretch = 0.288  # from 3:4 to 4:3.
  config.curriculum = (
    common.stage("96px", 195_500, size=96, text_length=8),
    common.stage("224px", 16_000, batch_size=32_768, size=224, drop_patches=0.3, warmup_steps=800),
    common.stage("336px", 8_000, batch_size=16_384, size=336, drop_patches=0.4, warmup_steps=1_600),
  )
  return config
