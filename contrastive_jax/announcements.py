"""What a run says of itself on the terminal, once and not once a host."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from contrastive_jax.models import dual_encoder
from contrastive_jax.parallel import distributed
from contrastive_jax.schedule.segments import Segment, draws_until
from contrastive_jax.training.optimizer import split_frozen
from contrastive_jax.training.run import Run
from contrastive_jax.training.state import StateSpec, TrainState


def introduce(
  run: Run,
  workdir: Path,
  spec: StateSpec,
  mesh: jax.sharding.Mesh,
  sources: Mapping[str, Any],
  segments: Sequence[Segment],
  start: int,
  credit: str,
) -> None:
  """Says what is about to run, on how much of which sources, and whose pictures it learns from."""
  devices = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}"
  config, weights = run.config, run.term_weights
  terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
  drawn = draws_until(segments, config.total_steps)
  samples = " + ".join(
    f"{name} {len(source):,} ({epochs(drawn.get(name, 0), len(source))})" for name, source in sources.items()
  )
  begin = f"from step {start}" if start else "from the beginning"
  say(f"{run.called(workdir)}: {count_parameters(spec):,} parameters, {terms} loss, on {devices}.")
  frozen = frozen_share(spec)
  if frozen:
    say(f"{frozen:.1%} of the parameters are frozen: {', '.join(spec.frozen)}.")
  if config.init_from and not start:
    part = "" if config.init_towers == "all" else f"the {config.init_towers} tower of "
    say(f"The weights begin as those of {part}{config.init_from}.")
  say(f"Training {begin} to step {config.total_steps} on {samples}.")
  if credit:
    say(credit)


def epochs(drawn: int, samples: int) -> str:
  """Says how often a source is gone through.

  Examples:
    >>> epochs(150, 100), epochs(100, 100), epochs(0, 100)
    ('1.50 epochs', '1.00 epoch', '0.00 epochs')
  """
  return f"{drawn / samples:,.2f} epoch{'s' * (drawn != samples)}"


def drawn_of(sources: Mapping[str, Any], segments: Sequence[Segment], step: int) -> dict[str, str]:
  """Returns the facts of a report about what a run has drawn of each source."""
  return {
    f"Drawn of {name}": f"{count:,} of {len(sources[name]):,} samples, {epochs(count, len(sources[name]))}"
    for name, count in draws_until(segments, step).items()
  }


def say_if_scale_is_cut(state: TrainState, most: float) -> None:
  """Says that the first update lowers the logit scale of the weights that a run starts from, where it does."""
  scale = math.exp(float(state.params["log_logit_scale"]))
  if scale > most * (1 + 1e-6):
    say(f"The first update lowers the logit scale from {scale:.1f} to max_logit_scale={most:g}; raise that to keep it.")


def say_what_was_changed(pipeline: Any) -> None:
  """Names the samples of this process that were not shown as they are."""
  changed = {
    "bad records replaced by others": pipeline.substituted,
    "images made smaller to fit into the rows of their pack": pipeline.shrunk,
    "captions cut to fit into theirs": pipeline.truncated,
  }
  for what, count in changed.items():
    if count:
      say(f"{count:,} {what}.")


def count_parameters(spec: StateSpec) -> int:
  """Returns the number of parameters of both towers, logit scale and bias included."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dual_encoder.abstract(spec.model)[1]))


def frozen_share(spec: StateSpec) -> float:
  """Returns the share of the dual encoder's parameters that is not trained."""
  _, frozen = split_frozen(dual_encoder.abstract(spec.model)[1], spec.frozen) if spec.frozen else ({}, {})
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(frozen)) / count_parameters(spec)


def say(message: str) -> None:
  """Prints once, not once a host."""
  if distributed.is_main():
    print(message, flush=True)
