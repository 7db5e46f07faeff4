"""Images a second on one core: the pipeline in its modes next to the same work called directly.

taskset -c 0 python -m benchmarks.data_overhead [--steps=40] [--resolution=64]

Every figure is a median over repetitions, in images a second of processor time and of wall time. The direct call reads,
warps, recolours and patchifies a batch without Grain, mixture, captions or groups: the ratio is what those cost.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app, flags

from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.images import patchify
from contrastive_jax.schedule.segments import Segment
from data import emoji
from data.augment import DRAWINGS, DRAWS, Augment
from data.pipeline import Pipeline

_STEPS = flags.DEFINE_integer("steps", 40, "Batches a repetition.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions.")
_BATCH = flags.DEFINE_integer("batch_size", 256, "Pairs a batch.")
_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Side of the images in pixels.")
_WORKERS = flags.DEFINE_bool("workers", True, "Whether worker processes are timed too.")
_PATCH = 16


def direct(sources: list[emoji.EmojiSource], augment: Augment, steps: range) -> Iterator[int]:
  """Does the image work alone, and yields the images done."""
  rng = np.random.default_rng(0)
  for _ in steps:
    picked = [sources[k % len(sources)] for k in range(_BATCH.value)]
    examples = [source[int(rng.integers(len(source)))] for source in picked]
    views = augment(
      [e.image for e in examples], [e.flip for e in examples], _RESOLUTION.value, rng.random((_BATCH.value, DRAWS))
    )
    patchify(np.stack(views), _PATCH)
    yield _BATCH.value


def rate(run: Callable[[range], Iterator[int]]) -> tuple[float, float]:
  """Returns the median of the images a second of processor time and of wall time."""
  processor, wall = [], []
  for repeat in range(_REPEATS.value):
    steps = range(repeat * _STEPS.value, (repeat + 1) * _STEPS.value)
    started = time.process_time(), time.perf_counter()
    images = sum(run(steps))
    processor.append(images / (time.process_time() - started[0]))
    wall.append(images / (time.perf_counter() - started[1]))
  return statistics.median(processor), statistics.median(wall)


def main(_: list[str]) -> None:
  """Prints a table."""
  sources = emoji.training_sources()
  tokenizer = tokenizers.train_bpe(emoji.training_captions(), 8192)
  segment = Segment(
    _STEPS.value * _REPEATS.value, _BATCH.value, tuple((name, 1) for name in sources), _RESOLUTION.value
  )

  def pipeline(augment: Augment, **options: int) -> Pipeline:
    return Pipeline(
      [segment], sources, tokenizer, text_length=16, patch_size=_PATCH, seed=0, augment=augment, **options
    )

  def batches(run: Pipeline) -> Callable[[range], Iterator[int]]:
    return lambda steps: (len(run.batch(step).ids) for step in steps)

  def iterated(run: Pipeline) -> Callable[[range], Iterator[int]]:
    return lambda steps: (len(batch.ids) for _, batch in run.iterate(steps.start, steps.stop))

  for source in sources.values():  # Decoded once and kept, as in training.
    for index in range(len(source)):
      source[index]
  print(f"{'':34}{'images/s':>10}{'ratio':>7}   of processor time, {'images/s':>9}{'ratio':>7}   of wall time")
  for title, augment in (("plain", Augment()), ("augmented", DRAWINGS)):
    base = rate(lambda steps, augment=augment: direct(list(sources.values()), augment, steps))
    cases = [
      ("direct call", base),
      ("batch(step)", rate(batches(pipeline(augment)))),
      ("iterate, no threads", rate(iterated(pipeline(augment, threads=0)))),
      ("iterate, 1 thread", rate(iterated(pipeline(augment, threads=1)))),
      ("iterate, 4 threads", rate(iterated(pipeline(augment, threads=4)))),
    ]
    if _WORKERS.value:
      # Starting the processes is part of it, and their processor time is not this process's.
      cases.append(("iterate, 1 worker process", (float("nan"), rate(iterated(pipeline(augment, workers=1)))[1])))
    for name, (processor, wall) in cases:
      line = f"{title + ', ' + name:34}{processor:10.0f}{processor / base[0]:7.2f}"
      print(f"{line}{'':22}{wall:9.0f}{wall / base[1]:7.2f}", flush=True)


if __name__ == "__main__":
  app.run(main)
