"""UniViTAR's training paradigm (arXiv 2504.01792): fixed resolution, then native, then images and clips in turn.

The paper publishes the paradigm, the architecture and 14.6 billion samples in all. It does not publish the stages'
lengths and sizes, the share of clips, the teacher, the head, the text tower or the optimiser: those here are ours.
Token limits are those of its successor (LongCat-Flash-Omni): 576 to 5,832 patches an image.
"""

from ml_collections import ConfigDict

from configs import common


def config_of(preset: str, *, pack_pairs: int, accumulation: int) -> ConfigDict:
  """Returns the run of one of the published sizes, for one v5e-256 slice or 32 H100s.

  Args:
    preset: of the towers.
    pack_pairs: whose images share rows: what a device embeds at once.
    accumulation: micro-batches a step.
  """
  config = common.get_config()
  config.name = preset
  config.batch_size = 32_768
  config.accumulation = accumulation
  config.total_steps = 445_000  # 14.6 billion pairs.
  config.loss = "sigmoid"
  config.model = common.model(preset)
  config.mesh.fsdp = 32  # Divides the widths of all towers, and the devices of both.

  config.optimizer.learning_rate = 1e-3
  config.optimizer.b2 = 0.95
  config.schedule.warmup_steps = 10_000

  config.tokenizer.spec = "sentencepiece:tokenizer.model"  # Of at most 32,000 tokens.
  config.data.sources = ConfigDict({"tfds/coco_captions": 1.0})  # An example: name your own, and its features.
  config.data.caption_key = "captions"
  config.data.pack_pairs = pack_pairs
  config.data.text_rows = pack_pairs // 4
  config.data.text_row_length = 128
  native = {"mode": "native", "min_tokens": 576, "max_tokens": 5832, "row_length": 16_384}
  config.curriculum = (
    common.stage("fixed", 300_000, size=224),
    common.stage("native", 100_000, rows=pack_pairs // 8, learning_rate=0.3, warmup_steps=2000, **native),
    common.stage(
      "video",
      45_000,
      rows=pack_pairs // 8,
      learning_rate=0.1,
      warmup_steps=2000,
      video_share=0.25,
      video_sources={"clips/videos": 1.0},  # A folder of clips: name your own.
      frames=8,
      video_max_tokens=16_384,
      video_rows=3 * pack_pairs // 8,
      video_row_length=16_384,
      **native,
    ),
  )
  return config
