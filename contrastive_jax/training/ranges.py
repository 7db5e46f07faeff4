"""The range of every numeric field of a config: one table, checked before anything is built.

A field of the config that holds numbers and has no row here fails `tests/training/test_ranges.py`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from contrastive_jax.bounds import BELOW_ONE, COUNT, DEGREES, FINITE, NOT_NEGATIVE, POSITIVE, SHARE, Range, as_float32
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import term_options

# Regular expressions of whole field names -> range; the first that matches holds.
RANGES: Mapping[str, Range] = {
  # JAX keeps 32 bits of a seed: any other number would be one of these in disguise, as -1 is 2**32 - 1.
  r"seed": Range(0, 2**32 - 1),
  r"total_steps|batch_size|accumulation|log_every|checkpoint_every|checkpoint_keep_last": Range(1, 2**31 - 1),
  r"checkpoint_keep_every|eval_every|max_skipped_steps|profile_steps": NOT_NEGATIVE,
  r"average_decay": BELOW_ONE,
  # Gradients of float32 logits of a million have no digits left.
  r"max_logit_scale": Range(1, 1e6),
  r"mesh\.\w+": Range(-1),
  r"objective\..+": POSITIVE,
  r"optimizer\.(learning_rate|muon_learning_rate|muon_rms|eps)": POSITIVE,
  r"optimizer\.(weight_decay|clip_norm)": NOT_NEGATIVE,
  r"optimizer\.(b1|b2|muon_beta)": BELOW_ONE,
  r"optimizer\.adafactor_decay": Range(0, 1, above=True),
  r"schedule\.(warmup_steps|cooldown_steps)": NOT_NEGATIVE,
  r"schedule\.end_factor": SHARE,
  r"schedule\.timescale": POSITIVE,
  r"distillation\.dim": NOT_NEGATIVE,
  r"model\.text\.tap": NOT_NEGATIVE,
  r"model\.embed_dim|model\.text\.(length|vocab_size)": COUNT,
  # The scale is a logarithm.
  r"model\.init_logit_scale": Range(-14, 14),
  r"model\.init_logit_bias": Range(-1e6, 1e6),
  r"model\.image\.(channels|image_size|patch_size|tubelet|max_time)": COUNT,
  # Pixels are scaled to [0, 1] before the mean is taken off.
  r"model\.image\.mean": SHARE,
  r"model\.image\.std": Range(0, 1, above=True),
  r"model\.(others\.\d+|\w+)\.transformer\.(width|depth|heads|mlp_dim|unroll)": COUNT,
  r"model\.(others\.\d+|\w+)\.transformer\.attention_length": NOT_NEGATIVE,
  r"model\.(others\.\d+|\w+)\.transformer\.(drop_path|dropout)": BELOW_ONE,
  r"model\.(others\.\d+|\w+)\.transformer\.layer_scale": POSITIVE,
  # A variance of 1 or more that is added leaves nothing of what is normalised.
  r"model\.(others\.\d+|\w+)\.transformer\.norm_eps": Range(0, 1, above=True, below=True),
  # Towers beside those of images and texts check their fields themselves.
  r"model\.others\.\d+\..+": FINITE,
  r"data\.max_bad_share": SHARE,
  r"data\.(prefetch_bytes|captions_per_image)": COUNT,
  r"data\.cache_bytes": NOT_NEGATIVE,
  # More of them than any machine runs at once would only end it.
  r"data\.(threads|workers)": Range(0, 1024),
  r"data\.(pack_pairs|text_rows|text_row_length)": NOT_NEGATIVE,
  r"data\.sources\..+": POSITIVE,
  r"data\.captions\.\w+": SHARE,
  r"data\.(strong_)?augment\.(rotate|hue)": DEGREES,
  # Beyond these nothing of a picture is left to see: it lies outside the frame, in one pixel, or at black and white.
  r"data\.(strong_)?augment\.zoom": Range(0.01, 100),
  r"data\.(strong_)?augment\.(contrast|saturation)": Range(0, 100),
  r"data\.(strong_)?augment\.(shear|stretch)": Range(0, 4),
  r"data\.(strong_)?augment\.shift": SHARE,
  r"data\.(strong_)?augment\.brightness": Range(0, 255),
  r"data\.(strong_)?augment\.(background|blur|colour|flatten|flip|grey|outline|unfill)": SHARE,
  r"data\.text_augment\.(stop_words|swap|delete|insert|share)": SHARE,
  r"(data|curriculum\.\d+)\.drop_patches": BELOW_ONE,
  # The last stage may say 0, which is the rest of the run.
  r"curriculum\.\d+\.steps": NOT_NEGATIVE,
  r"curriculum\.\d+\.(distillation|learning_rate|weights\..+)": NOT_NEGATIVE,
  r"curriculum\.\d+\.video_share": SHARE,
  r"curriculum\.\d+\.(sources|video_sources)\..+": POSITIVE,
  r"curriculum\.\d+\.(batch_size|size|min_tokens|max_tokens|lengths|rows|row_length|warmup_steps)": NOT_NEGATIVE,
  r"curriculum\.\d+\.text_(length|rows|row_length)": NOT_NEGATIVE,
  r"curriculum\.\d+\.(frames|frame_rate|video_size|video_max_tokens|video_rows|video_row_length)": NOT_NEGATIVE,
}


def range_of(name: str) -> Range | None:
  """Returns the range of a field by its full name, such as "optimizer.b1"; None where it has none.

  Those of the options of terms stand beside the options.
  """
  if name.startswith("loss_options."):
    _, term, option = name.split(".", 2)
    field = term_options().get(term, {}).get(option)
    return field and field.metadata.get("range")
  return next((limits for pattern, limits in RANGES.items() if re.fullmatch(pattern, name)), None)


def check_ranges(config: Mapping[str, Any]) -> None:
  """Compares every number of a config with the table.

  Args:
    config: the config as nested dictionaries and lists.

  Raises:
    UserError: for the first number that is not finite or outside its range, with the field and what would work.
  """
  for name, value in numbers(config):
    limits = range_of(name) or FINITE
    if not limits.holds(value):
      finite = "" if math.isfinite(value) or limits == FINITE else "finite and "
      rounded = "" if not limits.contains(value) else f", and it is {as_float32(value)} as the float32 that steps use"
      raise UserError(f"{name}={value} must be {finite}{limits}{rounded}")


def numbers(node: Any, name: str = "") -> Iterator[tuple[str, float | int]]:
  """Yields every number of a config with the full name of its field; the items of a tuple share the field's name."""
  if isinstance(node, Mapping):
    for key, value in node.items():
      yield from numbers(value, f"{name}.{key}" if name else str(key))
  elif isinstance(node, list | tuple):
    for index, value in enumerate(node):
      yield from numbers(value, f"{name}.{index}" if isinstance(value, Mapping) else name)
  elif isinstance(node, int | float) and not isinstance(node, bool):
    yield name, node
