"""What distillation, native resolution and a code of time are worth: short runs of configs/univitar_emoji.py in pairs.

  make train                               # the teacher, in runs/emoji
  python -m benchmarks.curriculum          # 21 runs in runs/curriculum; an hour on 2 cores
  python -m benchmarks.curriculum --comparisons=time --seeds=0

Runs that are complete are not repeated. Every comparison gives both sides the same number of tokens of the same images:

  distillation  a quarter of the config's steps at 64 pixels, from the captions alone or with the teacher
  native        then strips among emoji: packed at native resolution, or all squeezed into 64 pixels for more steps
  time          clips alone, from random weights: no code of time, a learned table, or 3-d rotary angles

The file is also the config of these runs: --config=benchmarks/curriculum.py:native.
"""

import dataclasses
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import short_runs
from configs import common, univitar_emoji

_QUARTER = 225
_NATIVE = 200
_SIDE = 64
_CLIPS = 200


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Variants that differ in one thing, and what they are scored on.

  Attributes:
    variants: arguments of `get_config`; the first is what the others are compared with.
    scores: (evaluation set, metric) of the table's columns.
    begins: the variant whose run of the same seed they start from; empty starts from random weights.
  """

  variants: tuple[str, ...]
  scores: tuple[tuple[str, str], ...]
  begins: str = ""


_FOUND = "image_retrieval_recall@"
COMPARISONS = {
  "distillation": Comparison(
    ("captions", "taught"),
    (("emoji_heldout", f"{_FOUND}1"), ("emoji_heldout", f"{_FOUND}10"), ("emoji_openmoji", "acc1")),
  ),
  "native": Comparison(
    ("squeezed", "native"),
    (("strips_heldout", f"{_FOUND}1"), ("strips_heldout", f"{_FOUND}10"), ("strips_openmoji", f"{_FOUND}10")),
    begins="taught",
  ),
  "time": Comparison(
    ("none", "learned", "rotary"),
    (("motion_heldout", "acc1"), ("motion_openmoji", "acc1"), ("motion_openmoji_still", "acc1")),
  ),
}


def get_config(variant: str) -> ConfigDict:
  """Returns the config of one run."""
  config = univitar_emoji.get_config()
  config.name = variant
  _, native, video = config.curriculum
  config.evals = ()
  if variant in ("captions", "taught"):
    stage = common.stage("fixed", _QUARTER, size=_SIDE)
    config.final_evals = ("emoji_heldout", "emoji_openmoji")
  elif variant in ("squeezed", "native"):
    steps = {"native": _NATIVE, "squeezed": _steps_of_equal_tokens(config, native)}[variant]
    how = univitar_emoji.NATIVE if variant == "native" else {"size": _SIDE}
    stage = common.stage(variant, steps, sources=native.sources.to_dict(), **how)
    config.final_evals = ("strips_heldout", "strips_openmoji")
  else:
    stage = common.stage(
      "clips",
      _CLIPS,
      size=_SIDE,
      video_share=1.0,
      video_sources=video.video_sources.to_dict(),
      frames=video.frames,
      frame_rule=video.frame_rule,
      video_size=video.video_size,
    )
    config.model.image.transformer.rope = "3d" if variant == "rotary" else "2d"
    config.model.image.time_position = "learned" if variant == "learned" else "none"
    config.model.image.max_time = video.frames // config.model.image.tubelet
    config.final_evals = ("motion_heldout", "motion_openmoji", "motion_openmoji_still")
  if variant != "taught":
    config.objective = ConfigDict({"sigmoid": 1.0})
    config.distillation.teacher = ""
  config.curriculum = (stage,)
  config.total_steps = stage.steps
  config.checkpoint_every = stage.steps
  return config


def _steps_of_equal_tokens(config: ConfigDict, native: ConfigDict) -> int:
  """Steps at fixed resolution with the tokens of the native ones, the padding of their rows counted as tokens."""
  native_tokens = native.rows * native.row_length / config.data.pack_pairs
  return round(_NATIVE * native_tokens / (_SIDE // config.model.image.patch_size) ** 2)


def train(root: Path, variant: str, seed: int, begins: str) -> Path:
  """Trains a variant, unless it is there, and returns its run directory."""
  workdir = root / f"{variant}-{seed}"
  options = [f"--config.seed={seed}"]
  if begins:
    options.append(f"--config.init_from={root / f'{begins}-{seed}'}")
  short_runs.train(f"benchmarks/curriculum.py:{variant}", workdir, *options)
  return workdir


def table(comparison: Comparison, scores: np.ndarray) -> str:
  """Returns the comparison in Markdown: mean over seeds, and each seed's difference to the first variant.

  Args:
    comparison: what was compared.
    scores: percent `[variant, seed, score]`.
  """
  lines = ["| | " + " | ".join(f"{dataset} {metric}" for dataset, metric in comparison.scores) + " |"]
  lines.append("|---" * (1 + len(comparison.scores)) + "|")
  for row, variant in enumerate(comparison.variants):
    cells = []
    for column in range(len(comparison.scores)):
      cell = f"{scores[row, :, column].mean():.1f}%"
      if row:
        cell += f" ({', '.join(f'{gain:+.1f}' for gain in scores[row, :, column] - scores[0, :, column])})"
      cells.append(cell)
    lines.append(f"| {variant} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main(_) -> None:
  root, seeds = Path(_WORKDIR.value), [int(seed) for seed in _SEEDS.value]
  for name in _COMPARISONS.value:
    comparison = COMPARISONS[name]
    scores = np.empty((len(comparison.variants), len(seeds), len(comparison.scores)))
    for column, seed in enumerate(seeds):
      if comparison.begins:
        train(root, comparison.begins, seed, "")
      for row, variant in enumerate(comparison.variants):
        workdir = train(root, variant, seed, comparison.begins)
        scores[row, column] = [100 * short_runs.score(workdir, *which) for which in comparison.scores]
    print(f"\n{name}, seeds {', '.join(map(str, seeds))}\n{table(comparison, scores)}\n", flush=True)


if __name__ == "__main__":
  # Not where this file is read as a config.
  _WORKDIR = flags.DEFINE_string("workdir", "runs/curriculum", "Where the runs go.")
  _SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of weights, draws and order.")
  _COMPARISONS = flags.DEFINE_list("comparisons", list(COMPARISONS), "Which of them to run.")
  app.run(main)
